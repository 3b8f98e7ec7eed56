"""Quantized matrices whose codes stay while their scales and minima learn, as parametrizations of a torch module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from trilemma.formats.grid import QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, unpack
from trilemma.model.decoder import Decoder
from trilemma.model.model import Model


class OnGrid(nn.Module):
    """A matrix (out, in) of fixed codes, as a function of what its scales and minima have learned.

    What is learned is relative, so that one learning rate suits all matrices: a scale is (1 + learned) times the one
    it began with, and a minimum moves by learned times half the range of its group (with two levels: is (1 + learned)
    times the first one).
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None
    sub_scales: Tensor | None
    sub_minima: Tensor | None

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        self.matrix = matrix
        spec, (rows, columns) = matrix.spec, matrix.shape
        size = spec.group_size(columns)
        codes = functional.pad(torch.from_numpy(matrix.codes), (0, size * spec.groups(columns) - columns))
        self._keep("codes", codes.reshape(rows, -1, size))
        for name in ("scales", "minima", "sub_scales", "sub_minima"):
            self._keep(name, _wide(getattr(matrix, name)))
        self.repeats = 1 if spec.supergroup is None else spec.supergroup // size
        self.reach = (spec.code_range[1] - spec.code_range[0]) / 2

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Nothing learned yet: zeros for the scales and, where the grid has them, for the minima."""
        return tuple(torch.zeros_like(values) for values in (self.scales, self.minima) if values is not None)

    def forward(self, *learned: Tensor) -> Tensor:
        """(out, in) f32; scales and minima are rounded to f16, as they will be stored, on the way forward alone."""
        scales, minima = self._grid(*learned)
        by_group = self._of_groups(through_f16(scales), self.sub_scales)
        shift = None if minima is None else self._of_groups(through_f16(minima), self.sub_minima)
        weight: Tensor = _Dequantized.apply(by_group, shift, self.codes)  # type: ignore[no-untyped-call]
        return weight.flatten(1)[:, : self.matrix.shape[1]]

    def learned(self, *learned: Tensor) -> QuantizedMatrix:
        """The same codes with what was learned."""
        scales, minima = self._grid(*learned)
        return replace(self.matrix, scales=_f16(scales), minima=None if minima is None else _f16(minima))

    def _grid(self, *learned: Tensor) -> tuple[Tensor, Tensor | None]:
        scales = self.scales * (1 + learned[0])
        if self.minima is None:
            return scales, None
        unit = self.reach * self.scales.abs() if self.sub_minima is None else self.minima
        return scales, self.minima + unit * learned[1]

    def _of_groups(self, values: Tensor, factors: Tensor | None) -> Tensor:
        if factors is None:
            return values
        return values.repeat_interleave(self.repeats, dim=1)[:, : factors.shape[1]] * factors

    def _keep(self, name: str, values: Tensor | None) -> None:
        self.register_buffer(name, values, persistent=False)


class _Dequantized(torch.autograd.Function):
    """codes * scales + minima of each group, (rows, groups, group); keeps the codes alone for the way back."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, minima: Tensor | None, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.shifted = minima is not None
        values = codes * scales[..., None]
        return values if minima is None else values.add_(minima[..., None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (codes,) = ctx.saved_tensors
        (grad,) = grads
        return (grad * codes).sum(-1), grad.sum(-1) if ctx.shifted else None, None


def put_on_grids(decoder: Decoder, model: Model, embedding: bool = True) -> dict[str, OnGrid]:
    """Let every quantized matrix of `decoder`, made from `model`, be a function of learned scales; name -> grid.

    embedding: False leaves embedding and head as they are.
    """
    found = {}
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and (embedding or name.startswith("layers.")):
            stored = model.stored(f"{name}.weight")
            if isinstance(stored, PackedMatrix):
                found[f"{name}.weight"] = grid = OnGrid(unpack(stored)).to(module.weight.device)
                parametrize.register_parametrization(module, "weight", grid, unsafe=True)
    return found


def learned_parameters(decoder: Decoder, name: str) -> list[nn.Parameter]:
    """What the scales (and minima) of matrix `name` learn, after `put_on_grids`."""
    return list(decoder.get_submodule(f"{name.removesuffix('.weight')}.parametrizations.weight").parameters())


def through_f16(values: Tensor) -> Tensor:
    """Rounded to f16 on the way forward; the gradient is that of `values`."""
    return values + (values.half().float() - values).detach()


def _wide(values: NDArray[Any] | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values.astype(np.float32))


def _f16(values: Tensor) -> NDArray[np.float16]:
    return values.detach().cpu().numpy().astype(np.float16)
