"""HQQ: the grid that leaves most weights nearly exact and some far off, found without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023
(mobiusml.github.io/hqq_blog). The error of a group is measured as sum |w - w'|^p with p < 1. Half-quadratic
splitting makes that a row of simple steps: an error e that is allowed to stand apart (a shrinkage of the
residual), then the minimum that fits w - e best for the codes as they are, then the codes for that minimum.

Two things differ from the published code. Residuals are measured in steps of their group's grid, so that one
`strength` suits weights of any size. And `fit: line` begins with the grid of least squared error and fits the scale
with the minimum; `fit: minimum` leaves it at the range of the group, as published. Without minima scales are fitted.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from trilemma.core.errors import RecipeError
from trilemma.formats.grid import Format, QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, pack
from trilemma.formats.quantize import Float16, codes_for, fit_grid, quantize_rtn, usable_codes
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Float32, Model
from trilemma.model.plain import PlainMatrix
from trilemma.techniques.quantize.assignment import WeightSettings, assign_formats, assign_runs, named
from trilemma.techniques.quantize.rtn import round_matrix
from trilemma.techniques.technique import Build, report

_BLOCK_VALUES = 1 << 20
_F16_TINY = 6e-8  # the smallest subnormal


class HqqSettings(WeightSettings):
    """Settings of `hqq`."""

    power: float = Field(0.7, gt=0, le=1, description="p of the error |w - w'|^p; smaller spares outliers less")
    strength: float = Field(
        10.0, gt=0, description="weight of the quadratic term at first; errors in steps of the grid"
    )
    growth: float = Field(1.01, ge=1, description="factor of that weight from one step to the next")
    steps: int = Field(20, ge=1, description="steps; each group keeps its best")
    fit: Literal["line", "minimum"] = Field("line", description="what is fitted: scale and minimum, or minimum alone")


class Hqq:
    """Quantize every matrix on its own, by a robust error."""

    name: ClassVar[str] = "hqq"
    what: ClassVar[str] = "fit grids by half-quadratic optimization of a robust error; needs no data"
    Settings: ClassVar[type[HqqSettings]] = HqqSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: HqqSettings) -> bool:
        return False

    def apply(self, model: Model, settings: HqqSettings, build: Build) -> Model:
        formats = assign_formats(model.config, settings)
        replaced = {}
        for done, (name, spec) in enumerate(formats.items()):
            report(build, done, len(formats), f"hqq {name}")
            replaced[name] = _round(name, model.tensor(name), spec, settings, build.device)
        report(build, len(formats), len(formats), "hqq")
        return model.with_tensors(replaced, assign_runs(model.config, formats, settings.activations))


def _round(name: str, values: Float32, spec: Format, settings: HqqSettings, device: str) -> PackedMatrix | PlainMatrix:
    if spec.floating:
        return round_matrix(name, values, spec)
    try:
        return pack(quantize_hqq(values, spec, settings, device))
    except RecipeError as error:
        raise named(name, error) from None


def quantize_hqq(w: Float32, spec: Format, settings: HqqSettings, device: str = "cpu") -> QuantizedMatrix:
    """One matrix (out, in) on its grid, codes nearest to its values; with scales of two levels, of least squared error.

    Raises:
        RecipeError: as `fit_grid`.
    """
    if spec.supergroup is not None or spec.values is not None:  # no steps, or uneven ones, to shrink by
        return quantize_rtn(w, spec, scale="mse")
    scales, minima = fit_grid(w, spec, scale="mse" if settings.fit == "line" else "absmax")
    rows = max(1, _BLOCK_VALUES // max(1, w.shape[1]))
    for first in range(0, len(w), rows):
        part = slice(first, first + rows)
        low = None if minima is None else minima[part]
        scales[part], fitted = _fit_rows(w[part], scales[part], low, spec, settings, device)
        if minima is not None and fitted is not None:
            minima[part] = fitted
    return QuantizedMatrix(spec, codes_for(w, scales, minima, spec), scales, minima)


def _fit_rows(
    w: Float32, scales: Float16, minima: Float16 | None, spec: Format, settings: HqqSettings, device: str
) -> tuple[Float16, Float16 | None]:
    columns = w.shape[1]
    size, groups = spec.group_size(columns), spec.groups(columns)
    filled = functional.pad(torch.from_numpy(w).to(device), (0, size * groups - columns))
    real = functional.pad(torch.ones(columns, device=device), (0, size * groups - columns)).reshape(groups, size)
    start = torch.from_numpy(scales.astype(np.float32)).to(device)
    low = None if minima is None else torch.from_numpy(minima.astype(np.float32)).to(device)
    found, shift = half_quadratic(filled.reshape(len(w), groups, size), real, start, low, usable_codes(spec), settings)
    return found.cpu().numpy().astype(np.float16), None if shift is None else shift.cpu().numpy().astype(np.float16)


def half_quadratic(
    w: Tensor, real: Tensor, scales: Tensor, minima: Tensor | None, codes: tuple[int, int], settings: HqqSettings
) -> tuple[Tensor, Tensor | None]:
    """Scales and minima (rows, groups), rounded to f16, of least error of those that the steps pass through.

    Args:
        w: (rows, groups, group). real: (groups, group), 0 on filling and else 1.
        scales, minima: to begin with; no minima on a symmetric grid. codes: lowest and highest.
    """
    beta = settings.strength
    best, best_low, least = scales, minima, torch.full_like(scales, torch.inf)
    for _ in range(settings.steps + 1):
        step = scales[..., None]
        shifted = w if minima is None else w - minima[..., None]
        chosen = torch.where(step != 0, shifted / step, torch.zeros_like(w)).round_().clamp_(*codes)
        residual = shifted - chosen * step
        error = (residual.abs().pow_(settings.power) * real).sum(-1)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
        apart = shrink(residual / step.abs().clamp_min(_F16_TINY), beta, settings.power) * step.abs()
        if minima is not None and best_low is not None:
            best_low = torch.where(better, minima, best_low)
            scales, minima = _fit_line(w - apart, chosen, real, scales, settings.fit)
        else:
            scales = _fit_scale(w - apart, chosen, real, scales)
        beta *= settings.growth
    return best, best_low


def shrink(x: Tensor, beta: float, power: float) -> Tensor:
    """The generalized soft threshold: about argmin_e |e|^p + beta / 2 (e - x)^2 (p = 1: the soft threshold itself)."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(torch.finfo(x.dtype).tiny).pow(power - 1) / beta).clamp_min_(0)


def _fit_line(target: Tensor, codes: Tensor, real: Tensor, scales: Tensor, fit: str) -> tuple[Tensor, Tensor]:
    """Scale and minimum of least squares for fixed codes (a line through (code, value)), or the minimum alone."""
    count = real.sum(-1)
    mean_code, mean_value = (codes * real).sum(-1) / count, (target * real).sum(-1) / count
    if fit == "line":
        centred = (codes - mean_code[..., None]) * real
        below = (centred * codes).sum(-1)
        fitted = (centred * target).sum(-1) / below
        scales = _as_f16(torch.where(below > 0, fitted, scales))
    return scales, (mean_value - scales * mean_code).half().float()


def _fit_scale(target: Tensor, codes: Tensor, real: Tensor, scales: Tensor) -> Tensor:
    below = (codes.square() * real).sum(-1)
    return _as_f16(torch.where(below > 0, (codes * target * real).sum(-1) / below, scales))


def _as_f16(scales: Tensor) -> Tensor:
    """Rounded to f16; one too small for f16 stays as small as that allows."""
    rounded = scales.half().float()
    return torch.where(
        (rounded == 0) & (scales != 0), torch.copysign(torch.full_like(scales, _F16_TINY), scales), rounded
    )
