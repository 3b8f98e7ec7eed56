"""Rounding to a grid, against a plain loop over groups, and at the edges of f16."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest

from trilemma.core.errors import RecipeError
from trilemma.formats import FORMATS
from trilemma.formats.plain import to_plain
from trilemma.formats.quantize import codes_for, fit_grid, quantize_rtn

INTEGER = [name for name in FORMATS.names() if not FORMATS.get(name).floating and not FORMATS.get(name).supergroup]
SHAPES = [(1, 1), (17, 33), (5, 172), (16, 576), (3, 200)]


IQ4_NL = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]  # of ggml-common.h
SYMMETRIC = {3: range(-4, 4), 4: range(-8, 8), 5: range(-16, 16), 6: range(-32, 32), 8: range(-127, 128)}


def absmax_by_hand(values: np.ndarray, bits: int, symmetric: bool, codebook: bool) -> np.ndarray:
    """What one group of values becomes, in f64 but for the rounding of scale and minimum to f16."""
    if symmetric:
        extreme = values[np.argmax(np.abs(values))]
        legal = np.array(IQ4_NL if codebook else SYMMETRIC[bits], np.float64)
        scale = float(np.float16(np.float32(extreme) / np.float32(legal[0])))
        return legal[np.abs(values[:, None] - legal * scale).argmin(axis=1)] * scale if scale else np.zeros_like(values)
    minimum = float(np.float16(values.min()))
    span = max(np.float32(values.max()) - np.float32(minimum), np.float32(0))
    levels = {2: 3, 3: 7, 4: 15, 5: 31}[bits]
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
            wanted[row, first : first + size] = absmax_by_hand(part, spec.bits, spec.symmetric, name == "nl4-g32")
    different = np.abs(found - wanted) > 1e-5
    assert different.mean() <= 0.002  # a value half-way between two codes may fall to either side
    assert np.abs(found - wanted).max() <= np.abs(values).max() * {2: 0.7, 3: 0.35}.get(spec.bits, 1 / 6)


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


@pytest.mark.parametrize("name", ["int3-g32", "int4-g32", "nl4-g32"])
def test_the_search_comes_close_to_the_best_scale_there_is(name, random_generator):
    spec = FORMATS.get(name)
    values = random_generator.standard_normal((40, 32)).astype(np.float32)
    found = np.square(quantize_rtn(values, spec, scale="mse").dequantize() - values).sum(axis=1)
    plain = np.square(quantize_rtn(values, spec).dequantize() - values).sum(axis=1)
    legal = np.array(IQ4_NL if name == "nl4-g32" else SYMMETRIC[spec.bits], np.float64)
    largest = 5 / -legal[0]
    scales = np.linspace(-largest, largest, 2000)[:, None, None]  # an even number: none of them is 0
    best = [np.square(legal * scales - row[:, None]).min(axis=2).sum(axis=1).min() for row in values]
    assert found.sum() <= 1.03 * np.sum(best)
    assert plain.sum() > 1.06 * np.sum(best)  # so there was something to find


def test_two_bits_with_minima_come_close_to_the_best_of_all_assignments(random_generator):
    """Sorted values take codes in ascending order: every way to cut them in four, each with its own best line."""
    values = random_generator.standard_normal((8, 16)).astype(np.float32)
    found = np.square(quantize_rtn(values, FORMATS.get("int2-g16-asym"), scale="mse").dequantize() - values).sum()
    cuts = np.array(list(combinations_with_replacement(range(17), 3)))
    codes = (np.arange(16)[:, None] >= cuts[:, None, :]).sum(axis=2).astype(np.float64)  # (ways, 16)
    centred = codes - codes.mean(axis=1, keepdims=True)
    spread = np.maximum(np.square(centred).sum(axis=1), 1e-9)
    best = 0.0
    for row in np.sort(values.astype(np.float64), axis=1):
        around = row - row.mean()
        best += (np.square(around).sum() - np.square(centred @ around) / spread).min()
    assert found <= 1.10 * best


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
    legal = spec.legal_codes[spec.legal_codes >= low]
    codes = random_generator.choice(legal, (6, 256)).astype(np.float32)
    codes[:, ::16], codes[:, 1::16] = low, high
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
