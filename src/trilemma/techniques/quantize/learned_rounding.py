"""A matrix on its grid as a differentiable function of which way each weight is rounded and where its group ends.

The code of w is round(w / s + v), v in [-0.5, 0.5] (SignRound, arXiv:2309.05516); with `start` codes that are not the
nearest ones, v is counted from them. The ends of a group's range have a factor each, 1 at first. Rounding, of codes
and of scales to f16, passes gradients straight through.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from trilemma.formats.grid import Grid, QuantizedMatrix
from trilemma.formats.quantize import usable_codes
from trilemma.techniques.distill.grids import through_f16

_MOST = 0.5  # of a range's end that can be taken away or added
_INSIDE = 0.49  # a start code is kept by v = 0, wherever its weight lies


class LearnedRounding(nn.Module):
    """Parametrization: (v (out, in), factors of scales or of both ends (out, groups)) -> weight (out, in).

    Args:
        weight: (out, in), on the device where it will learn.
        start: grid and codes to begin with. A grid with scales of two levels stays as it is, v alone is learned.
    """

    weight: Tensor
    shift: Tensor
    scales: Tensor
    minima: Tensor | None

    def __init__(self, weight: Tensor, start: QuantizedMatrix) -> None:
        super().__init__()
        self.spec, self.columns, self.start = start.spec, weight.shape[1], start
        self.levels = usable_codes(start.spec)
        device = weight.device
        self._keep("weight", self._grouped(weight.detach()))
        grid = Grid(start.spec, start.scales, start.minima, start.sub_scales, start.sub_minima)
        minima = grid.offsets()
        self._keep("scales", torch.from_numpy(grid.steps()).to(device))
        self._keep("minima", None if minima is None else torch.from_numpy(minima).to(device))
        codes = self._grouped(torch.from_numpy(start.codes.astype(np.float32)).to(device))
        exact = self._in_steps(self.scales, self.minima)
        shift = codes + (exact - codes).clamp(-_INSIDE, _INSIDE) - exact
        beyond = exact.round().clamp(*self.levels) == codes  # the nearest code, however far: clipped weights stay so
        self._keep("shift", torch.where(beyond, torch.zeros_like(shift), shift))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Nothing learned yet: zeros."""
        ends = [] if self.spec.supergroup is not None else [self.scales, self.minima]
        return (torch.zeros_like(weight), *(torch.zeros_like(end) for end in ends if end is not None))

    def forward(self, v: Tensor, *ends: Tensor) -> Tensor:
        """(out, in) f32."""
        codes, scales, minima = self.on_grid(v, *ends)
        values = codes * scales[..., None]
        if minima is not None:
            values = values + minima[..., None]
        return values.flatten(1)[:, : self.columns]

    def on_grid(self, v: Tensor, *ends: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes (out, groups, group), scales and minima (out, groups), each rounded."""
        scales, minima = self._grid(*(1 + end.clamp(-_MOST, _MOST) for end in ends))
        exact = self._in_steps(scales, minima) + self.shift + self._grouped(v).clamp(-0.5, 0.5)
        return (exact + (exact.round() - exact).detach()).clamp(*self.levels), scales, minima

    def _grid(self, *factors: Tensor) -> tuple[Tensor, Tensor | None]:
        if not factors:
            return self.scales, self.minima
        if self.minima is None:
            return through_f16(self.scales * factors[0]), None
        top, bottom = (self.minima + self.levels[1] * self.scales) * factors[0], self.minima * factors[1]
        return through_f16((top - bottom) / self.levels[1]), through_f16(bottom)

    def _in_steps(self, scales: Tensor, minima: Tensor | None) -> Tensor:
        """Weights in steps of their group's grid; 0 where that has none."""
        shifted = self.weight if minima is None else self.weight - minima[..., None]
        step = scales[..., None]
        return shifted / torch.where(step == 0, torch.inf, step)

    def _grouped(self, values: Tensor) -> Tensor:
        size, groups = self.spec.group_size(self.columns), self.spec.groups(self.columns)
        return functional.pad(values, (0, size * groups - self.columns)).reshape(len(values), groups, size)

    def _keep(self, name: str, values: Tensor | None) -> None:
        self.register_buffer(name, values, persistent=False)


def learn_rounding(module: nn.Module, start: QuantizedMatrix) -> None:
    """Let `module.weight` be on the grid of `start`, as a function of parameters that begin with its codes."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    parametrize.register_parametrization(module, "weight", LearnedRounding(weight, start), unsafe=True)


def is_learned(parameter: str, ranges: bool) -> bool:
    """Whether a parameter of this name is one that `learn_rounding` made; those of ranges only where asked for."""
    path, _, leaf = parameter.rpartition(".")
    return path.endswith("parametrizations.weight") and (ranges or leaf == "original0")


def learned_matrix(module: nn.Module) -> QuantizedMatrix:
    """Codes and grid that a module of `learn_rounding` has now."""
    chain = module.get_submodule("parametrizations.weight")
    assert isinstance(chain, parametrize.ParametrizationList)
    rounding = chain[0]
    assert isinstance(rounding, LearnedRounding)
    with torch.no_grad():
        codes, scales, minima = rounding.on_grid(*chain.parameters())
    flat = codes.flatten(1)[:, : rounding.columns].to(torch.int8).cpu().numpy()
    if rounding.spec.supergroup is not None:
        return replace(rounding.start, codes=flat)
    wide = None if minima is None else minima.cpu().numpy().astype(np.float16)
    return replace(rounding.start, codes=flat, scales=scales.cpu().numpy().astype(np.float16), minima=wide)
