"""Activations rounded on the way forward as they will be when the model runs; gradients pass as if they were not.

The straight-through estimator of Bengio et al. 2013 (arXiv 1308.3432).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.model.decoder import Decoder
from trilemma.model.model import Activation, Model
from trilemma.techniques.calibration import round_activations


def round_straight_through(decoder: Decoder, model: Model) -> None:
    """Let every product of `decoder` see its input rounded as `model` says.

    The head's input is rounded where the final norm puts it out: a loss may use the head's matrix directly.
    """
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            _hook_input(module, model.linear(f"{name}.weight").activation)
    head = "embedding.weight" if decoder.head is None else "head.weight"
    activation = model.linear(head).activation
    if activation != "f32":
        decoder.final_norm.register_forward_hook(lambda _, __, output: rounded(output, activation))


def rounded(x: Tensor, activation: Activation) -> Tensor:
    """x (..., in) as the products will see it; its gradient is that of x."""
    if activation == "f32":
        return x
    with torch.no_grad():
        target = round_activations(x) if activation == "int8-g32" else x.to(torch.bfloat16).to(x.dtype)
        shift = target - x
    return x + shift


def _hook_input(module: nn.Linear, activation: Activation) -> None:
    if activation != "f32":
        module.register_forward_pre_hook(lambda _, args: (rounded(args[0], activation),))
