"""The one loop that shows a model its calibration text, a layer at a time, in bounded memory.

For each layer: run all windows through it and gather statistics of what enters its matrices, let
the technique replace matrices, run the windows again through the changed layer, and hand its
output to the next one. So every layer is calibrated on what the compressed layers before it really
produce. In memory are one layer, its statistics and the hidden states of the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from trilemma.core.errors import RecipeError
from trilemma.model.config import DecoderConfig
from trilemma.model.decoder import DecoderLayer, layer_from_model
from trilemma.model.model import Float32, LinearRun, Model, StoredMatrix
from trilemma.techniques.technique import Build, report

_BATCH_TOKENS = 8192
ACTIVATION_GROUP = 32

Replace = Callable[[Mapping[str, "Gram"]], Mapping[str, Float32 | StoredMatrix]]


class Gram:
    """X^T X of all inputs (tokens, in) that a matrix saw, and how many there were."""

    def __init__(self, columns: int, device: str | torch.device = "cpu") -> None:
        self.matrix = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        self.matrix.addmm_(flat.T, flat)
        self.tokens += flat.shape[0]

    def hessian(self) -> Tensor:
        """H = 2 X^T X / tokens, (in, in): of the mean squared output error of one row."""
        return self.matrix * (2.0 / max(1, self.tokens))


def calibrate_layers(model: Model, build: Build, runs: Mapping[str, LinearRun], replace: Replace) -> Model:
    """Walk the layers; `replace` gets the Gram of every matrix of one layer and returns what to put in.

    Args:
        build: `calibration` holds the windows, (n, context) int32.
        runs: input precision of each product; where it is int8, inputs are rounded so here too.

    Returns:
        The model with everything that `replace` gave put in.

    Raises:
        RecipeError: no windows, a token outside the vocabulary, or activations that are not finite.
    """
    windows = _windows(model, build)
    with using_threads(build.threads), torch.no_grad():
        hidden = _embed(model, windows).to(build.device)  # (windows, context, dim)
        total = len(model.config.layers)
        for index in range(total):
            report(build, index, total, f"layer {index}: reading activations")
            layer = layer_from_model(model, index, device=build.device)
            grams = _gather(layer, index, model.config, hidden, runs)
            report(build, index, total, f"layer {index}: choosing codes")
            model = model.with_tensors(replace(grams))
            if index + 1 < total:
                _advance(layer_from_model(model, index, device=build.device), index, hidden, runs)
        report(build, total, total, "layers done")
    return model


def input_groups(config: DecoderConfig, index: int) -> list[tuple[str, ...]]:
    """Matrices of a layer that see the same input, in order of execution: (q, k, v), (o), (gate, up), (down)."""
    names = [name for name in config.linear_names() if name.startswith(f"layers.{index}.")]
    together = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    groups = (tuple(name for name in names if name.split(".")[-2] in roles) for roles in together)
    return [group for group in groups if group]


def round_activations(x: Tensor, group: int = ACTIVATION_GROUP) -> Tensor:
    """x (..., in) rounded to int8 in groups along the last dimension, absolute maximum at 127."""
    columns = x.shape[-1]
    padded = nn.functional.pad(x, (0, -columns % group))
    grouped = padded.reshape(*x.shape[:-1], -1, group)
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(scale > 0, (grouped / scale).round(), grouped) * scale
    whole: Tensor = rounded.reshape(padded.shape)[..., :columns]
    return whole


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Run torch with so many threads, then as before."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _windows(model: Model, build: Build) -> Tensor:
    if build.calibration is None or not build.calibration.size:
        raise RecipeError("This technique needs calibration text. Give some with --data (or `data=`).")
    windows = np.asarray(build.calibration)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= model.config.vocab_size:
        raise RecipeError(
            f"The calibration windows hold token {low if low < 0 else high}; the vocabulary has "
            f"{model.config.vocab_size}. Encode the text with this model's own tokenizer."
        )
    if windows.shape[1] > model.config.max_context:
        raise RecipeError(
            f"The calibration windows have {windows.shape[1]} tokens; "
            f"the model's context is {model.config.max_context}. Cut shorter ones."
        )
    return torch.from_numpy(windows.astype(np.int64))


def _embed(model: Model, windows: Tensor) -> Tensor:
    """Hidden states (windows, context, dim) from the embedding; only the rows in use are kept."""
    used, places = torch.unique(windows, return_inverse=True)
    rows = model.tensor("embedding.weight")[used.numpy()]
    return torch.from_numpy(rows)[places]


def _batches(hidden: Tensor) -> Iterator[slice]:
    step = max(1, _BATCH_TOKENS // hidden.shape[1])
    for first in range(0, hidden.shape[0], step):
        yield slice(first, first + step)


def _gather(
    layer: DecoderLayer, index: int, config: DecoderConfig, hidden: Tensor, runs: Mapping[str, LinearRun]
) -> dict[str, Gram]:
    grams: dict[str, Gram] = {}
    hooks = _rounding_hooks(layer, index, runs)
    for group in input_groups(config, index):
        linear = _linear(layer, group[0])
        gram = Gram(linear.in_features, hidden.device)
        grams |= dict.fromkeys(group, gram)
        hooks.append(linear.register_forward_pre_hook(lambda _, args, gram=gram: gram.update(args[0])))
    for batch in _batches(hidden):
        layer(hidden[batch])
    for hook in hooks:
        hook.remove()
    for name, gram in grams.items():
        if not torch.isfinite(gram.matrix).all():
            raise RecipeError(
                f"The inputs of '{name}' are not finite on the calibration text. Use bf16 for this model."
            )
    return grams


def _advance(layer: DecoderLayer, index: int, hidden: Tensor, runs: Mapping[str, LinearRun]) -> None:
    """Replace the hidden states by the layer's output, in place."""
    _rounding_hooks(layer, index, runs)
    for batch in _batches(hidden):
        hidden[batch] = layer(hidden[batch])


def _rounding_hooks(
    layer: DecoderLayer, index: int, runs: Mapping[str, LinearRun]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Let every product whose activations will be int8 see them rounded."""
    hooks = []
    for path, module in layer.named_modules():
        run = runs.get(f"layers.{index}.{path}.weight")
        if isinstance(module, nn.Linear) and run is not None and run.activation == "int8-g32":
            hooks.append(module.register_forward_pre_hook(lambda _, args: (round_activations(args[0]), *args[1:])))
    return hooks


def _linear(layer: DecoderLayer, name: str) -> nn.Linear:
    _, _, path = name.removesuffix(".weight").split(".", 2)
    found = layer.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found
