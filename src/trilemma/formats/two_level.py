"""Fitting grids whose scales have two levels: f16 steps of a supergroup, whole factors of its groups.

Everything is rounded as the grid stores it before any code is chosen. The search goes from free to bound:

    1. each group's own line of least weighted squared error, from several starts;
    2. the f16 steps of a supergroup, among many, that hold the lines of its groups with least added error: a quadratic
       form of the sums over a group's codes says how much, so a candidate costs a few operations a group;
    3. groups move to neighbouring factors and supergroups to the steps that fit best to all of their codes, as long
       as the true error falls.

llama.cpp's `make_qkx3_quants` does the first, then rounds slopes and offsets to their factors on their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import RecipeError
from trilemma.formats.grid import Format, Grid
from trilemma.formats.lines import Flags, Float32, Groups, Lines, quotient

_BLOCK_VALUES = 1 << 17
_F16_MAX = np.float32(65504)
_F16_TINY = np.float32(2.0**-24)  # the smallest subnormal
# Shares of the whole range that lines start from, and how many, by bits: few bits clip more.
_STARTS = {2: (0.55, 1.1, 8), 3: (0.6, 1.1, 6), 4: (0.72, 1.02, 4), 5: (0.82, 1.02, 4), 6: (0.86, 1.04, 3)}
_REFITS, _ROUNDS = 3, 2
# Changes of factors that are tried one by one, of slopes (without and with minima) and of minima.
_SCANNED = {True: range(-20, 15), False: range(-8, 9)}
_SCANNED_MINIMA = range(-2, 3)
_CANDIDATES = np.linspace(1.03, 0.6, 32, dtype=np.float32)  # the largest factor, as a share of the largest there is


def fit_two_level(w: Float32, spec: Format, *, search: bool = True, importance: Float32 | None = None) -> Grid:
    """The grid of a matrix (out, in) whose scales have two levels.

    Args:
        search: the least squared error that is found; else all values of each group just covered.
        importance: (in,) weight of each input's squared error, or None for equal ones.

    Raises:
        RecipeError: a value is not finite, or so large that the scales overflow f16.
    """
    rows, columns = w.shape
    weight = _folded_weight(spec, columns, importance)
    step = max(1, _BLOCK_VALUES // max(1, columns))
    found = []
    for first in range(0, rows, step):
        x = _folded(w[first : first + step], spec)
        _check_range(x, spec)
        groups = Groups(spec, x, weight)
        found.append(_searched(groups) if search else _covering(groups))
    return _as_grid(found, spec, columns)


@dataclass(frozen=True, eq=False)
class _Levels:
    """f16 steps as f32, (rows, supergroups, 1), and factors of groups, whole numbers as f32."""

    step: Float32
    factor: Float32
    minimum: Float32
    minimum_factor: Float32

    def lines(self, groups: Groups) -> Lines:
        return groups.lines(self.step * self.factor, self.minimum * self.minimum_factor)


def _folded(w: Float32, spec: Format) -> Float32:
    """(rows, in) -> (group size, rows, supergroups, groups), filled with zeros."""
    assert spec.supergroup is not None
    assert spec.group is not None
    full = np.pad(w, ((0, 0), (0, -w.shape[1] % spec.supergroup)))
    parts = full.reshape(len(w), -1, spec.supergroup // spec.group, spec.group)
    return np.ascontiguousarray(parts.transpose(3, 0, 1, 2))


def _folded_weight(spec: Format, columns: int, importance: Float32 | None) -> Float32:
    """(group size, 1, supergroups, groups) weights of squared errors, of mean 1; zero on filling."""
    ones = _folded(np.ones((1, columns), np.float32), spec)
    if importance is None:
        return ones
    mean = max(float(np.mean(importance, dtype=np.float64)), 1e-30)
    weight = _folded((importance / mean).astype(np.float32)[None], spec)
    # A group that no calibration input touched still gets the best plain fit, and moves no step of the others.
    return np.where(weight.sum(axis=0) > 0, weight, ones * np.float32(1e-6))


def _check_range(x: Float32, spec: Format) -> None:
    largest = float(np.max(np.abs(x), initial=0.0))
    if not np.isfinite(largest):
        raise RecipeError(f"A weight is NaN or infinite; it can not be stored as {spec.name}. Repair the checkpoint.")
    bound = float(_F16_MAX) * spec.factor_range[1] * (spec.code_range[1] if spec.symmetric else 1) * 0.9
    if largest > bound:
        raise RecipeError(
            f"A weight of {largest:.4g} overflows the f16 scales of {spec.name} (at most {bound:.4g}). "
            "Keep this tensor in bf16: overrides: {'<tensor name>': 'bf16'}."
        )


def _to_f16(values: Float32) -> Float32:
    """The nearest f16 values, as f32; never 0 for what is not 0, never infinite."""
    rounded = np.clip(values, -_F16_MAX, _F16_MAX).astype(np.float16).astype(np.float32)
    return np.where((rounded == 0) & (values != 0), np.copysign(_F16_TINY, values), rounded)


def _outwards(values: Float32) -> Float32:
    """f16 values at least as large in magnitude, as f32."""
    nearest = np.clip(np.abs(values), 0, _F16_MAX).astype(np.float16)
    beyond = np.minimum(np.nextafter(nearest, np.float16(np.inf)), np.float16(_F16_MAX)).astype(np.float32)
    wide = nearest.astype(np.float32)
    return np.copysign(np.where(wide < np.abs(values), beyond, wide), values)


def _largest(values: Float32) -> Float32:
    """(rows, supergroups, groups) -> (rows, supergroups, 1): the value of largest magnitude."""
    return np.take_along_axis(values, np.abs(values).argmax(axis=2, keepdims=True), axis=2)


def _extreme_factor(spec: Format) -> np.float32:
    """The factor that the largest slope gets: the lowest one where factors have signs."""
    low, high = spec.factor_range
    return np.float32(low or high)


def _covering(groups: Groups) -> _Levels:
    """The least steps and factors with which every value lies within the range of codes."""
    low, high = groups.spec.factor_range
    slope, offset = groups.range_lines()
    minimum = _outwards(_largest(offset) / np.float32(high))
    minimum_factor = np.clip(np.ceil(quotient(offset, minimum)), 0, high)
    if not groups.spec.symmetric:
        slope = np.maximum(groups.x.max(axis=0) - minimum * minimum_factor, np.float32(0)) / np.float32(groups.high)
    step = _outwards(_largest(slope) / np.float32(high))
    ratio = quotient(slope, step)
    factor = np.clip(np.copysign(np.ceil(np.abs(ratio)), ratio), low, high)
    return _Levels(step, factor, minimum, minimum_factor)


def _searched(groups: Groups) -> _Levels:
    bound, plain = _bound(groups, _free_lines(groups)), _covering(groups)
    levels, lines = _keep_supergroups(groups, plain, plain.lines(groups), bound)
    for _ in range(_ROUNDS):
        levels, lines = _keep_groups(groups, levels, lines, _refitted_factors(groups, levels, lines))
        levels, lines = _keep_supergroups(groups, levels, lines, _refitted_steps(groups, levels, lines))
    levels, lines = _keep_groups(groups, levels, lines, _scanned_factors(groups, levels, lines))
    return _keep_supergroups(groups, levels, lines, _refitted_steps(groups, levels, lines))[0]


def _free_lines(groups: Groups) -> Lines:
    """The best line that is found for each group alone."""
    slope, offset = groups.range_lines()
    symmetric = groups.spec.symmetric
    middle = offset + slope * np.float32(0.5 * groups.high)
    best = groups.lines(slope, offset)
    for share in np.linspace(*_STARTS[groups.spec.bits], dtype=np.float32):
        for sign in (1, -1) if symmetric else (1,):
            start = offset if symmetric else np.minimum(middle + (offset - middle) * share, np.float32(0))
            found = groups.lines(slope * np.float32(sign * share), start)
            best = best.better(groups.lines(found.best_slope, found.best_offset))
    for _ in range(_REFITS):
        best = best.better(groups.lines(best.best_slope, best.best_offset))
    return best


def _bound(groups: Groups, free: Lines) -> _Levels:
    """Steps of supergroups and factors of groups that change the free lines least in error."""
    low, high = groups.spec.factor_range
    tilt = quotient(free.once, groups.total)  # how far the best offset falls as the slope grows
    stiffness = np.maximum(free.square - tilt * free.once, 0)
    step, factor = _best_step(free.slope, stiffness, _extreme_factor(groups.spec), low, high)
    if groups.spec.symmetric:
        return _Levels(step, factor, np.zeros_like(step), np.zeros_like(factor))
    wanted = np.minimum(free.offset - tilt * (step * factor - free.slope), np.float32(0))
    minimum, minimum_factor = _best_step(wanted, groups.total, np.float32(high), 0, high)
    return _Levels(step, factor, minimum, minimum_factor)


def _best_step(wanted: Float32, weight: Float32, extreme: np.float32, low: int, high: int) -> tuple[Float32, Float32]:
    """The f16 step, and factors within low..high, whose products are nearest to what each group wants."""
    top = _largest(wanted)
    least = np.full(top.shape, np.inf, np.float32)
    best, factors = np.zeros_like(top), np.zeros_like(wanted)
    for share in _CANDIDATES:
        step = _to_f16(top / (extreme * share))
        factor = np.clip(np.rint(quotient(wanted, step)), low, high)
        error = (weight * np.square(step * factor - wanted)).sum(axis=2, keepdims=True)
        better = error < least
        least, best = np.where(better, error, least), np.where(better, step, best)
        factors = np.where(better, factor, factors)
    return best, factors


def _keep_groups(groups: Groups, levels: _Levels, lines: Lines, proposed: _Levels) -> tuple[_Levels, Lines]:
    """The proposed factors of those groups whose error they lower; steps are the same."""
    found = proposed.lines(groups)
    better = found.error < lines.error
    kept = replace(
        levels, factor=np.where(better, proposed.factor, levels.factor),
        minimum_factor=np.where(better, proposed.minimum_factor, levels.minimum_factor),
    )  # fmt: skip
    return kept, found.where(better, lines)


def _keep_supergroups(groups: Groups, levels: _Levels, lines: Lines, proposed: _Levels) -> tuple[_Levels, Lines]:
    """What is proposed for those supergroups whose error it lowers."""
    found = proposed.lines(groups)
    better: Flags = found.error.sum(axis=2, keepdims=True) < lines.error.sum(axis=2, keepdims=True)
    kept = _Levels(
        np.where(better, proposed.step, levels.step), np.where(better, proposed.factor, levels.factor),
        np.where(better, proposed.minimum, levels.minimum),
        np.where(better, proposed.minimum_factor, levels.minimum_factor),
    )  # fmt: skip
    return kept, found.where(better, lines)


def _refitted_factors(groups: Groups, levels: _Levels, lines: Lines) -> _Levels:
    """Factors near the line that fits best to each group's codes."""
    low, high = groups.spec.factor_range
    near = np.rint(quotient(lines.best_slope, levels.step))
    least = np.full(near.shape, np.inf, np.float32)
    best = levels
    for change in (-1, 0, 1):
        factor = np.clip(near + np.float32(change), low, high)
        tried = _with_factor(groups, levels, lines, factor)
        slope = levels.step * factor - lines.best_slope
        offset = levels.minimum * tried.minimum_factor - lines.best_offset
        error = lines.square * slope**2 + 2 * lines.once * slope * offset + groups.total * offset**2
        better = error < least
        least = np.where(better, error, least)
        best = replace(
            best, factor=np.where(better, factor, best.factor),
            minimum_factor=np.where(better, tried.minimum_factor, best.minimum_factor),
        )  # fmt: skip
    return best


def _scanned_factors(groups: Groups, levels: _Levels, lines: Lines) -> _Levels:
    """The best factors in a wide neighbourhood: the error has many minima, as codes fall in place together."""
    low, high = groups.spec.factor_range
    least, best = lines.error, levels
    for change in _SCANNED[groups.spec.symmetric]:
        factor = np.clip(levels.factor + np.float32(change), low, high)
        around = _with_factor(groups, levels, lines, np.where(factor == 0, levels.factor, factor))
        for shift in (0,) if groups.spec.symmetric else _SCANNED_MINIMA:
            minimum_factor = np.clip(around.minimum_factor + np.float32(shift), 0, high)
            slope = levels.step * around.factor
            error = groups.errors(slope, levels.minimum * minimum_factor)
            better = (error < least) & (slope != 0)
            least = np.where(better, error, least)
            best = replace(
                best, factor=np.where(better, around.factor, best.factor),
                minimum_factor=np.where(better, minimum_factor, best.minimum_factor),
            )  # fmt: skip
    return best


def _with_factor(groups: Groups, levels: _Levels, lines: Lines, factor: Float32) -> _Levels:
    """These factors of slopes, with the factors of minima that fit them best for the same codes."""
    high = np.float32(groups.spec.factor_range[1])
    tilt = quotient(lines.once, groups.total)
    wanted = lines.best_offset - tilt * (levels.step * factor - lines.best_slope)
    return replace(levels, factor=factor, minimum_factor=np.clip(np.rint(quotient(wanted, levels.minimum)), 0, high))


def _refitted_steps(groups: Groups, levels: _Levels, lines: Lines) -> _Levels:
    """The steps of least error for the same factors and codes: two equations a supergroup."""
    a, b = levels.factor, levels.minimum_factor

    def over(values: Float32) -> Float32:
        return np.asarray(values.sum(axis=2, keepdims=True))

    aa, ab, bb = over(a * a * lines.square), over(a * b * lines.once), over(b * b * groups.total)
    toward_a = over(a * (lines.square * lines.best_slope + lines.once * lines.best_offset))
    toward_b = over(b * (lines.once * lines.best_slope + groups.total * lines.best_offset))
    determinant = aa * bb - ab * ab
    both = determinant > np.float32(1e-6) * aa * bb
    step = np.where(both, quotient(bb * toward_a - ab * toward_b, determinant), quotient(toward_a, aa))
    minimum = np.where(both, quotient(aa * toward_b - ab * toward_a, determinant), levels.minimum)
    return replace(levels, step=_to_f16(step), minimum=np.minimum(_to_f16(minimum), np.float32(0)))


def _as_grid(found: list[_Levels], spec: Format, columns: int) -> Grid:
    def steps(parts: list[Float32]) -> NDArray[np.float16]:
        return np.concatenate(parts).astype(np.float16)[:, :, 0]

    def factors(parts: list[Float32]) -> NDArray[np.int8]:
        whole = np.concatenate(parts).astype(np.int8)
        return np.ascontiguousarray(whole.reshape(len(whole), -1)[:, : spec.groups(columns)])

    scales, sub_scales = steps([one.step for one in found]), factors([one.factor for one in found])
    if spec.symmetric:
        return Grid(spec, scales, None, sub_scales)
    # A minimum of zero is -0.0, as it comes back from a file that stores it with the other sign.
    minima = -np.abs(steps([one.minimum for one in found]))
    return Grid(spec, scales, minima, sub_scales, factors([one.minimum_factor for one in found]))
