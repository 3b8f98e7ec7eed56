"""Activations rounded on the way forward as they will be when the model runs; gradients pass as if they were not.

The straight-through estimator of Bengio et al. 2013 (arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trilemma.model.decoder import Decoder
from trilemma.model.model import Model
from trilemma.runtime.reference import input_rounding


def round_straight_through(decoder: Decoder, model: Model) -> None:
    """Let every product of `decoder` see its input rounded as `model` says.

    The head's input is rounded where the final norm puts it out: a loss may use the head's matrix directly.
    """
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            _hook_input(module, model, f"{name}.weight")
    head = "embedding.weight" if decoder.head is None else "head.weight"
    if model.linear(head).activation != "f32":
        rounding = input_rounding(model, head)
        decoder.final_norm.register_forward_hook(lambda _, __, output: straight_through(output, rounding))


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """x (..., in) as the products will see it; its gradient is that of x."""
    with torch.no_grad():
        shift = rounding(x) - x
    return x + shift


def _hook_input(module: nn.Linear, model: Model, name: str) -> None:
    if model.linear(name).activation != "f32":
        rounding = input_rounding(model, name)
        module.register_forward_pre_hook(lambda _, args: (straight_through(args[0], rounding),))
