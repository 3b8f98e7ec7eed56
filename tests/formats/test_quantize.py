"""Rounding to a grid, against a plain loop over groups, and at the edges of f16."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import RecipeError
from trilemma.formats import FORMATS
from trilemma.formats.plain import to_plain
from trilemma.formats.quantize import codes_for, fit_grid, quantize_rtn

INTEGER = [name for name in FORMATS.names() if name.startswith("int") and FORMATS.get(name).supergroup is None]
SHAPES = [(1, 1), (17, 33), (5, 172), (16, 576), (3, 200)]


def absmax_by_hand(values: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """What one group of values becomes, in f64 but for the rounding of scale and minimum to f16."""
    if symmetric:
        extreme = values[np.argmax(np.abs(values))]
        low, high = {4: (-8, 7), 5: (-16, 15), 8: (-127, 127)}[bits]
        scale = float(np.float16(np.float32(extreme) / np.float32(low)))
        codes = np.clip(np.rint(values / scale), low, high) if scale else np.zeros_like(values)
        return codes * scale
    minimum = float(np.float16(values.min()))
    span = max(np.float32(values.max()) - np.float32(minimum), np.float32(0))
    levels = {4: 15, 5: 31}[bits]
    scale = float(np.float16(span / np.float32(levels)))
    codes = np.clip(np.rint((values - minimum) / scale), 0, levels) if scale else np.zeros_like(values)
    return codes * scale + minimum


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", INTEGER)
def test_absmax_equals_a_loop_over_groups(name, shape, random_generator):
    spec = FORMATS.get(name)
    values = random_generator.standard_normal(shape).astype(np.float32)
    found = quantize_rtn(values, spec).dequantize()
    size = spec.group or shape[1]
    wanted = np.empty(shape)
    for row in range(shape[0]):
        for first in range(0, shape[1], size):
            part = values[row, first : first + size].astype(np.float64)
            wanted[row, first : first + size] = absmax_by_hand(part, spec.bits, spec.symmetric)
    different = np.abs(found - wanted) > 1e-5
    assert different.mean() <= 0.002  # a value half-way between two codes may fall to either side
    assert np.abs(found - wanted).max() <= np.abs(values).max() / 6


@pytest.mark.parametrize("name", INTEGER)
def test_searched_scales_are_never_worse_and_usually_better(name, random_generator):
    spec = FORMATS.get(name)
    values = random_generator.standard_t(4, (9, 300)).astype(np.float32)
    importance = random_generator.uniform(0.01, 10, 300).astype(np.float32)

    def error(matrix, weight):
        return float((np.square(matrix.dequantize() - values) * weight).sum())

    plain, searched = quantize_rtn(values, spec), quantize_rtn(values, spec, scale="mse")
    weighted = quantize_rtn(values, spec, scale="mse", importance=importance)
    assert error(searched, 1) <= error(plain, 1)
    # At 8 bits the best scale hardly depends on the weights, and the grid of the search is coarser than that.
    assert error(weighted, importance) < error(searched, importance) * (1 if spec.bits < 8 else 1.02)


def test_the_search_comes_close_to_the_best_scale_there_is(random_generator):
    spec = FORMATS.get("int4-g32")
    values = random_generator.standard_normal((40, 32)).astype(np.float32)
    found = np.square(quantize_rtn(values, spec, scale="mse").dequantize() - values).sum(axis=1)
    plain = np.square(quantize_rtn(values, spec).dequantize() - values).sum(axis=1)
    scales = np.linspace(-0.6, 0.6, 6000)[:, None]  # an even number: none of them is 0
    codes = (np.clip(np.rint(row / scales), -8, 7) * scales - row for row in values)
    best = np.array([np.square(errors).sum(axis=1).min() for errors in codes])
    assert found.sum() <= 1.03 * best.sum()
    assert plain.sum() > 1.06 * best.sum()  # so there was something to find


def test_four_bits_use_the_code_minus_eight(random_generator):
    matrix = quantize_rtn(random_generator.standard_normal((64, 64)).astype(np.float32), FORMATS.get("int4-g32"))
    grouped = matrix.codes.reshape(64, 2, 32)
    assert (grouped.min(axis=2) == -8).all()
    assert (matrix.scales < 0).any()
    assert (matrix.scales > 0).any()


def test_eight_bits_stay_within_127(random_generator):
    codes = quantize_rtn(random_generator.standard_normal((64, 64)).astype(np.float32), FORMATS.get("int8-g32")).codes
    assert codes.min() >= -127


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", INTEGER)
def test_values_that_lie_on_the_grid_come_back_exactly(name, rule, random_generator):
    """Codes from the extremes of the range with power-of-two scales: rounding must not move them."""
    spec = FORMATS.get(name)
    low, high = (-127, 127) if spec.bits == 8 else spec.code_range
    codes = random_generator.integers(low, high, (6, 256), endpoint=True).astype(np.float32)
    codes[:, ::32], codes[:, 1::32] = low, high
    values = codes * np.float32(0.25)
    np.testing.assert_array_equal(quantize_rtn(values, spec, scale=rule).dequantize(), values)


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", INTEGER)
def test_zero_groups_and_tiny_and_huge_values_are_safe(name, rule):
    spec = FORMATS.get(name)
    values = np.zeros((4, 256), np.float32)
    values[1] = 1e-12
    values[2, :5] = 3e-7
    values[3] = np.linspace(-3e4, 3e4, 256)
    found = quantize_rtn(values, spec, scale=rule).dequantize()
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], 0)
    assert np.abs(found[1:3] - values[1:3]).max() <= 1e-6
    assert np.abs(found[3] - values[3]).max() <= 6e4 / 15


@pytest.mark.parametrize("name", INTEGER)
def test_values_that_overflow_f16_scales_are_refused(name):
    with pytest.raises(RecipeError, match=r"overflows the f16 scales .* bf16"):
        quantize_rtn(np.full((2, 40), 3e7, np.float32), FORMATS.get(name))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    values = np.ones((2, 40), np.float32)
    values[1, 3] = bad
    with pytest.raises(RecipeError, match="NaN or infinite"):
        quantize_rtn(values, FORMATS.get("int4-g32"), scale="mse")


def test_codes_for_given_scales_are_the_nearest(random_generator):
    spec = FORMATS.get("int4-g64-asym")
    values = random_generator.standard_normal((7, 100)).astype(np.float32)
    scales, minima = fit_grid(values, spec, scale="mse")
    codes = codes_for(values, scales, minima, spec)
    wide = np.repeat(scales.astype(np.float64), 64, axis=1)[:, :100]
    shift = np.repeat(minima.astype(np.float64), 64, axis=1)[:, :100]
    every = np.arange(16)[:, None, None] * wide + shift
    nearest = np.abs(every - values).min(axis=0)
    np.testing.assert_allclose(np.abs(codes * wide + shift - values), nearest, atol=1e-6)


def test_casts_round_to_nearest_even(random_generator):
    import torch

    values = (random_generator.standard_normal((33, 17)) * 10.0 ** random_generator.integers(-4, 4, (33, 17))).astype(
        np.float32
    )
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        wanted = torch.from_numpy(values).to(dtype).float().numpy()
        np.testing.assert_array_equal(to_plain(values, name).dequantize(), wanted)
    with pytest.raises(RecipeError, match="does not fit f16"):
        to_plain(np.full((1, 1), 1e5, np.float32), "f16")
