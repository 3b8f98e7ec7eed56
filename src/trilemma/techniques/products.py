"""How a layer's products are computed while it is calibrated: as they will run later, as far as that is told."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trilemma.model.decoder import DecoderLayer
from trilemma.model.model import LinearRun

ACTIVATION_GROUP = 32


def prepare_products(layer: DecoderLayer, index: int, runs: Mapping[str, LinearRun]) -> None:
    """Let the products of a layer, for inference alone, see and compute what their runs say.

    Inputs that will be int8 are rounded so. Products that will not run in f32 are taken in bf16, with f32 sums, where
    the device has instructions for that: it is twice as fast, and rounds inputs and outputs to 8 bits of significand.
    """
    mine = threading.local()  # the input rounded last and its rounding: q, k and v (gate and up) share one

    def rounded(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if getattr(mine, "input", None) is not args[0]:
            mine.input, mine.rounded = args[0], round_activations(args[0])
        return (mine.rounded, *args[1:])

    for path, module in layer.named_modules():
        run = runs.get(f"layers.{index}.{path}.weight")
        if isinstance(module, nn.Linear) and run is not None:
            if run.activation == "int8-g32":
                module.register_forward_pre_hook(rounded)
            if run.activation != "f32" and has_fast_bf16(module.weight.device):
                compute_in_bf16(module)


def compute_in_bf16(linear: nn.Linear) -> None:
    """Take the product in bf16 and give it back in the dtype of its input; the weights stay in bf16 alone."""
    linear.to(torch.bfloat16).requires_grad_(False)
    weight, bias = linear.weight, linear.bias  # to hold the module itself would keep it until cycles are looked for

    def product(x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(torch.bfloat16), weight, bias).to(x.dtype)

    linear.forward = product  # type: ignore[method-assign,assignment]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products of bf16 are faster than those of f32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def round_activations(x: Tensor, group: int = ACTIVATION_GROUP) -> Tensor:
    """x (..., in) rounded to int8 in groups along the last dimension, absolute maximum at 127."""
    columns = x.shape[-1]
    padded = nn.functional.pad(x, (0, -columns % group))
    grouped = padded.reshape(*x.shape[:-1], -1, group)
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    scale = torch.maximum(high, -low) / 127
    rounded = (grouped / scale.clamp(min=torch.finfo(scale.dtype).tiny)).round_().mul_(scale)
    whole: Tensor = rounded.reshape(padded.shape)[..., :columns]
    return whole
