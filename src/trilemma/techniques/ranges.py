"""How large activations are, and in how few channels: what decides whether f16 overflows and int8 is unstable.

Looks at what every module of the torch decoder puts out, and channel by channel at what enters its matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trilemma.model.decoder import Decoder
from trilemma.model.model import Model

_MOST_TOKENS = 4096


@dataclass(frozen=True)
class ActivationRanges:
    """The largest absolute value anywhere and where; the matrix whose input has the worst outlier channel.

    outlier_ratio: that channel's largest absolute value over the median of all its channels' largest ones.
    """

    largest: float
    largest_at: str
    outlier_ratio: float
    outlier_at: str


def activation_ranges(model: Model, windows: NDArray[np.int32]) -> ActivationRanges:
    """Run windows (n, context), at most 4096 tokens of them, through the model in f32 arithmetic.

    Raises:
        CheckpointError: as `Model.tensor` does.
    """
    decoder = Decoder.from_model(model).eval().requires_grad_(False)
    largest: dict[str, float] = {}
    channels: dict[str, Tensor] = {}

    def see_output(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.numel():
            largest[name] = max(largest.get(name, 0.0), float(output.abs().max()))

    def see_input(name: str, x: Tensor) -> None:
        found = x.reshape(-1, x.shape[-1]).abs().amax(0)
        channels[name] = torch.maximum(channels[name], found) if name in channels else found

    for name, module in decoder.named_modules():
        if name:
            module.register_forward_hook(lambda _, __, output, name=name: see_output(name, output))
        if isinstance(module, nn.Linear) and name.startswith("layers."):
            module.register_forward_pre_hook(lambda _, args, name=name: see_input(name, args[0]))
    with torch.inference_mode():
        for window in windows[: max(1, _MOST_TOKENS // windows.shape[1])]:
            decoder(torch.from_numpy(window.astype(np.int64))[None], last_only=True)
    ratios = {name: float(found.max() / found.median().clamp(min=1e-30)) for name, found in channels.items()}
    top, worst = max(largest, key=largest.__getitem__), max(ratios, key=ratios.__getitem__)
    return ActivationRanges(largest[top], top, ratios[worst], worst)
