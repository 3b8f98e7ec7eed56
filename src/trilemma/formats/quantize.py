"""Rounding to a grid: scales and minima by absolute maximum or by search, then codes.

Scales and minima are rounded to f16 before codes are chosen, so what is optimized is what runs.
Symmetric groups of few bits use the lowest code (-8 of 4 bits): the scale's sign is chosen so that the
value of largest magnitude gets it, as GGUF's Q4_0 does. Eight-bit codes stay within -127..127. Error
feedback between columns is GPTQ's work (`techniques/quantize/gptq.py`). Scales of two levels are `two_level.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import RecipeError
from trilemma.formats.grid import Format, Grid, QuantizedMatrix
from trilemma.formats.two_level import fit_two_level

ScaleRule = Literal["absmax", "mse"]
Float32 = NDArray[np.float32]
Float16 = NDArray[np.float16]

_BLOCK_VALUES = 1 << 18
_F16_MAX = 65504.0
_F16_TINY = np.float16(6e-8)  # the smallest subnormal
# Shares of the absmax scale that the search starts from; at 8 bits clipping much never pays, and few codes leave many
# minima of the error to choose between.
_SYMMETRIC_GRIDS = {
    3: np.linspace(0.45, 1.25, 24), 4: np.linspace(0.65, 1.15, 12), 5: np.linspace(0.70, 1.10, 12),
    6: np.linspace(0.75, 1.05, 18), 8: np.linspace(0.80, 1.02, 12),
}  # fmt: skip
_CODEBOOK_GRID = np.linspace(0.65, 1.15, 16)
_ASYMMETRIC_GRIDS = {2: np.linspace(0.40, 1.0, 9), 3: np.linspace(0.55, 1.0, 10)}
_ASYMMETRIC_GRID = np.linspace(0.70, 1.0, 13)
_SHIFTS = {2: (-0.2, 0.0, 0.2), 3: (-0.1, 0.0, 0.1)}  # of the middle, shares of half the span
_REFITS = 4


def usable_codes(spec: Format) -> tuple[int, int]:
    """Lowest and highest code that our quantizers make: the grid's range, but -127 for 8 bits."""
    low, high = spec.code_range
    return (-high, high) if spec.symmetric and spec.bits == 8 else (low, high)


def nearest_codes(scaled: Float32, spec: Format) -> Float32:
    """The code nearest to each value, as f32; `scaled` may be overwritten."""
    if spec.values is not None:
        return spec.legal_codes.astype(np.float32)[np.searchsorted(code_borders(spec), scaled)]
    low, high = usable_codes(spec)
    return np.clip(np.rint(scaled, out=scaled), low, high, out=scaled)


def code_borders(spec: Format) -> Float32:
    """(codes - 1,) values half-way between two codes of a codebook."""
    codes = spec.legal_codes.astype(np.float32)
    return (codes[1:] + codes[:-1]) / np.float32(2)


def quantize_rtn(
    w: Float32, spec: Format, *, scale: ScaleRule = "absmax", importance: Float32 | None = None
) -> QuantizedMatrix:
    """Round to nearest on a grid fitted group by group.

    Args:
        w: (out, in) f32.
        scale: 'absmax' covers the largest value of each group; 'mse' searches the scale (and
            minimum) of least squared error, weighted by `importance`.
        importance: (in,) weight of each input's squared error, or None for equal ones.

    Raises:
        RecipeError: a value is not finite, or so large that its scale overflows f16.
    """
    grid = find_grid(w, spec, scale=scale, importance=importance)
    return grid.with_codes(codes_for(w, grid.steps(), grid.offsets(), spec))


def find_grid(w: Float32, spec: Format, *, scale: ScaleRule = "absmax", importance: Float32 | None = None) -> Grid:
    """The grid of a matrix (out, in) on any integer format; arguments and errors as `quantize_rtn`."""
    if spec.supergroup is not None:
        return fit_two_level(w, spec, search=scale == "mse", importance=importance)
    return Grid(spec, *fit_grid(w, spec, scale=scale, importance=importance))


def fit_grid(
    w: Float32, spec: Format, *, scale: ScaleRule = "absmax", importance: Float32 | None = None
) -> tuple[Float16, Float16 | None]:
    """Scales (out, groups) and, for an asymmetric grid of one level, minima (out, groups), rounded to f16.

    Raises:
        RecipeError: a grid whose scales have two levels (see `find_grid`), or values that it can not hold.
    """
    rows, columns = w.shape
    if spec.supergroup is not None:
        raise RecipeError(
            f"'{spec.name}' has scales of two levels, which this technique does not fit. "
            "Take rtn or gptq, or a format such as int4-g32-asym."
        )
    groups = spec.groups(columns)
    scales = np.empty((rows, groups), dtype=np.float16)
    minima = None if spec.symmetric else np.empty((rows, groups), dtype=np.float16)
    weight = _grouped_weight(spec, columns, importance)
    step = max(1, _BLOCK_VALUES // max(1, columns))
    for first in range(0, rows, step):
        block = _grouped(w[first : first + step], spec)
        _check_range(block, spec)
        if minima is None:
            scales[first : first + step] = _fit_symmetric(block, spec, scale, weight)
        else:
            fit = _fit_asymmetric(block, spec, scale, weight)
            scales[first : first + step], minima[first : first + step] = fit.scales, fit.minima
    return scales, minima


def codes_for(
    w: Float32, scales: Float16 | Float32, minima: Float16 | Float32 | None, spec: Format
) -> NDArray[np.int8]:
    """The nearest code of each value, (out, in) int8, for given scales and minima of groups; 0 where a scale is 0."""
    rows, columns = w.shape
    codes = np.empty((rows, columns), dtype=np.int8)
    step = max(1, _BLOCK_VALUES // max(1, columns))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        block = _grouped(w[part], spec)
        low = None if minima is None else minima[part]
        rounded = _codes(block, scales[part], low, spec)
        codes[part] = rounded.reshape(block.shape[0], -1)[:, :columns]
    return codes


@dataclass(frozen=True)
class _Fit:
    scales: Float16
    minima: Float16


def _grouped(w: Float32, spec: Format) -> Float32:
    """(rows, in) -> (rows, groups, group), a short last group filled with its last value."""
    rows, columns = w.shape
    size, groups = spec.group_size(columns), spec.groups(columns)
    missing = size * groups - columns
    full = np.pad(w, ((0, 0), (0, missing)), mode="edge") if missing else w
    return full.reshape(rows, groups, size)


def _grouped_weight(spec: Format, columns: int, importance: Float32 | None) -> Float32 | None:
    """(1, groups, group) weights of squared errors, zero on filling; None when all are one."""
    missing = spec.group_size(columns) * spec.groups(columns) - columns
    if importance is None and not missing:
        return None
    weight = np.ones(columns, dtype=np.float32) if importance is None else importance.astype(np.float32)
    full: Float32 = np.pad(weight, (0, missing)).reshape(1, spec.groups(columns), -1)
    # A group that no calibration input touched still gets the best plain fit.
    dead = full.sum(axis=2, keepdims=True) <= 0
    filler = np.pad(np.ones(columns, dtype=np.float32), (0, missing)).reshape(full.shape)
    return np.where(dead, filler, full)


def _check_range(block: Float32, spec: Format) -> None:
    largest = float(np.max(np.abs(block), initial=0.0))
    if not np.isfinite(largest):
        raise RecipeError(f"A weight is NaN or infinite; it can not be stored as {spec.name}. Repair the checkpoint.")
    bound = _F16_MAX * (usable_codes(spec)[1] if spec.symmetric else 1) * 0.9
    if largest > bound:
        raise RecipeError(
            f"A weight of {largest:.4g} overflows the f16 scales of {spec.name} (at most {bound:.4g}). "
            "Keep this tensor in bf16: overrides: {'<tensor name>': 'bf16'}."
        )


def _to_f16(values: Float32) -> Float16:
    """Round scales to f16; one too small for f16 becomes the smallest that is not zero."""
    rounded = values.astype(np.float16)
    return np.where((rounded == 0) & (values != 0), np.copysign(_F16_TINY, values).astype(np.float16), rounded)


def _inverse(scales: Float16 | Float32) -> Float32:
    wide = scales.astype(np.float32)
    return np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)


def _codes(block: Float32, scales: Float16 | Float32, minima: Float16 | Float32 | None, spec: Format) -> Float32:
    """(rows, groups, group) -> nearest codes as f32."""
    shifted = block if minima is None else block - minima.astype(np.float32)[:, :, None]
    return nearest_codes(shifted * _inverse(scales)[:, :, None], spec)


def _error(block: Float32, codes: Float32, scales: Float16, minima: Float16 | None, weight: Float32 | None) -> Float32:
    """(rows, groups) weighted squared error."""
    difference = codes * scales.astype(np.float32)[:, :, None]
    if minima is not None:
        difference += minima.astype(np.float32)[:, :, None]
    difference -= block
    np.square(difference, out=difference)
    if weight is not None:
        difference *= weight
    return np.asarray(difference.sum(axis=2))


def _fit_symmetric(block: Float32, spec: Format, rule: ScaleRule, weight: Float32 | None) -> Float16:
    low = usable_codes(spec)[0]
    top, bottom = block.max(axis=2), block.min(axis=2)
    signed = np.where(top > -bottom, top, bottom)  # the value of largest magnitude
    exact = signed / np.float32(low)
    best = _to_f16(exact)
    if rule == "absmax":
        return best
    least = _error(block, _codes(block, best, None, spec), best, None, weight)
    signs = (1.0, -1.0) if spec.bits < 8 else (1.0,)
    for factor in (sign * step for sign in signs for step in _starts(spec)):
        best, least = _keep_better(block, spec, weight, _to_f16(exact * np.float32(factor)), best, least)
    for _ in range(_REFITS):
        best, least = _keep_better(block, spec, weight, best, best, least)
    return best


def _starts(spec: Format) -> NDArray[np.float64]:
    """Shares of the absmax scale that the search starts from."""
    if spec.values is not None:
        return _CODEBOOK_GRID
    return _SYMMETRIC_GRIDS[spec.bits] if spec.symmetric else _ASYMMETRIC_GRIDS.get(spec.bits, _ASYMMETRIC_GRID)


def _keep_better(
    block: Float32, spec: Format, weight: Float32 | None, start: Float16, best: Float16, least: Float32
) -> tuple[Float16, Float32]:
    """Where it has less error, the scale that fits best to the codes that `start` gives."""
    codes = _codes(block, start, None, spec)
    fitted = _least_squares_scale(block, codes, weight, start)
    error = _error(block, codes, fitted, None, weight)
    better = error < least
    return np.where(better, fitted, best), np.where(better, error, least)


def _least_squares_scale(block: Float32, codes: Float32, weight: Float32 | None, old: Float16) -> Float16:
    """The scale of least error for fixed codes; the old one where all codes are zero."""
    weighted = codes if weight is None else codes * weight
    above, below = (weighted * block).sum(axis=2), (weighted * codes).sum(axis=2)
    fitted = np.divide(above, below, out=old.astype(np.float32), where=below > 0)
    return _to_f16(fitted)


def _fit_asymmetric(block: Float32, spec: Format, rule: ScaleRule, weight: Float32 | None) -> _Fit:
    top, bottom = block.max(axis=2), block.min(axis=2)
    levels = np.float32(usable_codes(spec)[1])
    minima = bottom.astype(np.float16)
    # The span is taken from the rounded minimum, else the top of the range could not be reached.
    best = _Fit(_to_f16(np.maximum(top - minima.astype(np.float32), 0) / levels), minima)
    if rule == "absmax":
        return best
    least = _error(block, _codes(block, best.scales, best.minima, spec), best.scales, best.minima, weight)
    middle, half = (top + bottom) / 2, (top - bottom) / 2
    for factor, shift in product(_starts(spec), _SHIFTS.get(spec.bits, (0.0,))):
        shrunk = half * np.float32(factor)
        fit = _Fit(_to_f16(2 * shrunk / levels), (middle + half * np.float32(shift) - shrunk).astype(np.float16))
        best, least = _keep_better_fit(block, spec, weight, fit, best, least)
    for _ in range(_REFITS):
        best, least = _keep_better_fit(block, spec, weight, best, best, least)
    return best


def _keep_better_fit(
    block: Float32, spec: Format, weight: Float32 | None, start: _Fit, best: _Fit, least: Float32
) -> tuple[_Fit, Float32]:
    """Where it has less error, the line that fits best to the codes that `start` gives."""
    codes = _codes(block, start.scales, start.minima, spec)
    fitted = _least_squares_fit(block, codes, weight, start)
    error = _error(block, codes, fitted.scales, fitted.minima, weight)
    better = error < least
    kept = _Fit(np.where(better, fitted.scales, best.scales), np.where(better, fitted.minima, best.minima))
    return kept, np.where(better, error, least)


def _least_squares_fit(block: Float32, codes: Float32, weight: Float32 | None, old: _Fit) -> _Fit:
    """Scale and minimum of least error for fixed codes: a weighted line through (code, value)."""
    ones = np.ones((1, 1, 1), dtype=np.float32) if weight is None else weight
    total = np.broadcast_to(ones, block.shape).sum(axis=2)
    mean_code, mean_value = (codes * ones).sum(axis=2) / total, (block * ones).sum(axis=2) / total
    centred = codes - mean_code[:, :, None]
    above = (centred * (block - mean_value[:, :, None]) * ones).sum(axis=2)
    below = (np.square(centred) * ones).sum(axis=2)
    scales = _to_f16(np.divide(above, below, out=old.scales.astype(np.float32), where=below > 0))
    minima = (mean_value - scales.astype(np.float32) * mean_code).astype(np.float16)
    return _Fit(scales, minima)
