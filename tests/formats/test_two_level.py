"""Fits of scales of two levels, against every pair of factors there is, and at the edges of f16."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from trilemma.core.errors import RecipeError
from trilemma.formats import FORMATS
from trilemma.formats.gguf.blocks import encode_matrix, target_of
from trilemma.formats.gguf.decode import decode_matrix
from trilemma.formats.quantize import find_grid, quantize_rtn

NAMES = [name for name in FORMATS.names() if FORMATS.get(name).supergroup is not None]


def squared(matrix, values, weight=1.0) -> float:
    return float((np.square(matrix.dequantize().astype(np.float64) - values) * weight).sum())


def best_of_all_factors(values, weight, step, minimum, spec) -> float:
    """The least error of one group among all factors, for given f16 steps, in f64."""
    low, high = spec.factor_range
    factors = [one for one in range(low, high + 1) if one]
    slopes = np.array(factors)[:, None, None] * step
    offsets = np.array([0.0] if spec.symmetric else np.arange(high + 1))[None, :, None] * minimum
    codes = np.clip(np.rint((values - offsets) / slopes), *spec.code_range)
    return float((np.square(codes * slopes + offsets - values) * weight).sum(axis=2).min())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_factors_are_nearly_the_best_of_all_for_their_steps(name, weighted, random_generator):
    spec = FORMATS.get(name)
    values = random_generator.standard_normal((6, 256)).astype(np.float32)
    weight = np.exp(random_generator.standard_normal(256) * weighted).astype(np.float32)
    found = quantize_rtn(values, spec, scale="mse", importance=weight)
    plain = quantize_rtn(values, spec, importance=weight)
    best = 0.0
    for row, part in enumerate(values.astype(np.float64)):
        minimum = 0.0 if found.minima is None else float(found.minima[row, 0])
        for first in range(0, 256, spec.group):
            inside = slice(first, first + spec.group)
            step = float(found.scales[row, 0])
            best += best_of_all_factors(part[inside], weight[inside].astype(np.float64), step, minimum, spec)
    assert best * 0.999 <= squared(found, values, weight) <= 1.06 * best
    assert squared(plain, values, weight) > (1.2 if spec.bits > 3 else 1.1) * best  # so there was something to find


@pytest.mark.parametrize("columns", [256, 300, 768])
@pytest.mark.parametrize("name", NAMES)
def test_the_search_is_never_worse_than_covering_and_weights_count(name, columns, random_generator):
    spec = FORMATS.get(name)
    values = random_generator.standard_t(4, (60, columns)).astype(np.float32) * 0.02
    weight = random_generator.uniform(0.01, 10, columns).astype(np.float32)
    plain, searched = quantize_rtn(values, spec), quantize_rtn(values, spec, scale="mse")
    assert squared(searched, values) < 0.9 * squared(plain, values)
    mindful = quantize_rtn(values, spec, scale="mse", importance=weight)
    assert squared(mindful, values, weight) < squared(searched, values, weight)


@pytest.mark.parametrize("name", NAMES)
def test_covering_lets_no_value_be_further_than_its_step_allows(name, random_generator):
    spec = FORMATS.get(name)
    values = (random_generator.standard_normal((7, 300)) * 10.0 ** random_generator.uniform(-2, 2, (7, 1))).astype("f4")
    found = quantize_rtn(values, spec)
    grid = find_grid(values, spec)
    step = np.abs(np.repeat(grid.steps(), spec.group, axis=1))[:, :300]
    within = 1.0001 if spec.symmetric else 0.5001  # the code opposite to the lowest is missing
    assert (np.abs(found.dequantize() - values) <= within * step + 1e-7).all()


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", NAMES)
def test_factors_fit_ggufs_blocks_which_keep_every_bit(name, rule, random_generator):
    spec = FORMATS.get(name)
    values = random_generator.standard_normal((21, 512)).astype(np.float32) * 0.05
    values[3], values[4, :256], values[5, 40:90] = 0, 1.5, -2.0
    matrix = quantize_rtn(values, spec, scale=rule)
    low, high = spec.factor_range
    assert matrix.sub_scales.min() >= low
    assert matrix.sub_scales.max() <= high
    assert matrix.minima is None or (matrix.minima <= 0).all()
    target = target_of(spec, 512)
    raw = encode_matrix(matrix, target, None)
    wanted = gguf.dequantize(raw, gguf.GGMLQuantizationType[target.type])
    np.testing.assert_array_equal(matrix.dequantize(), wanted)
    back = decode_matrix(raw.reshape(-1), target.type, matrix.shape, "w")
    for part in ("codes", "scales", "minima", "sub_scales", "sub_minima"):
        ours, theirs = getattr(matrix, part), getattr(back, part)
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.tobytes() == theirs.tobytes(), part


@pytest.mark.parametrize("name", NAMES)
def test_supergroups_and_rows_do_not_touch_each_other(name, random_generator):
    spec = FORMATS.get(name)
    values = random_generator.standard_normal((40, 300)).astype(np.float32)
    whole = quantize_rtn(values, spec, scale="mse")
    first = quantize_rtn(values[7:9, :256], spec, scale="mse")
    np.testing.assert_array_equal(whole.codes[7:9, :256], first.codes)
    np.testing.assert_array_equal(whole.scales[7:9, :1], first.scales)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_without_importance_still_get_a_fit_and_cost_the_others_nothing(name, random_generator):
    spec = FORMATS.get(name)
    values = random_generator.standard_normal((5, 256)).astype(np.float32)
    weight = np.ones(256, np.float32)
    weight[:32] = 0
    found = quantize_rtn(values, spec, scale="mse", importance=weight).dequantize()
    assert np.square(found - values)[:, :32].mean() < 4 * np.square(found - values)[:, 32:].mean()
    nothing = quantize_rtn(values, spec, scale="mse", importance=np.zeros(256, np.float32))
    assert squared(nothing, values) < 1.02 * squared(quantize_rtn(values, spec, scale="mse"), values)


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", NAMES)
def test_zero_tiny_and_large_values_are_safe(name, rule):
    spec = FORMATS.get(name)
    values = np.zeros((4, 256), np.float32)
    values[1] = 1e-12
    values[2, :5] = 3e-7
    values[3] = np.linspace(-3e4, 3e4, 256)
    found = quantize_rtn(values, spec, scale=rule).dequantize()
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], 0)
    assert np.abs(found[1:3] - values[1:3]).max() <= 1e-6
    assert np.abs(found[3] - values[3]).max() <= 6e4 / (15 if spec.bits > 2 else 10)  # four levels lie far apart


@pytest.mark.parametrize("name", NAMES)
def test_small_weights_survive_the_coarse_end_of_f16(name, random_generator):
    """Steps of 1e-3 / 63 / 15 are a few units of f16's smallest numbers."""
    spec = FORMATS.get(name)
    values = random_generator.standard_normal((8, 256)).astype(np.float32)
    relative = [
        squared(quantize_rtn(values * size, spec, scale="mse"), values * size) / squared_of(values * size)
        for size in (np.float32(1), np.float32(1e-3))
    ]
    assert relative[1] < 1.35 * relative[0]


def squared_of(values) -> float:
    return float(np.square(values.astype(np.float64)).sum())


@pytest.mark.parametrize(("value", "why"), [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (3e9, "bf16")])
@pytest.mark.parametrize("name", NAMES)
def test_values_that_no_grid_holds_are_refused(name, value, why):
    values = np.ones((2, 256), np.float32)
    values[1, 3] = value
    with pytest.raises(RecipeError, match=why):
        quantize_rtn(values, FORMATS.get(name), scale="mse")
