"""HQQ against the published formulas and a search over all grids of one group; what it is for: outliers stand apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trilemma.core.errors import RecipeError
from trilemma.formats import FORMATS
from trilemma.formats.quantize import codes_for, quantize_rtn
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.quantize.hqq import HqqSettings, quantize_hqq, shrink
from trilemma.techniques.schemes import scheme_to_recipe

SHAPES = [(7, 70), (5, 96), (3, 200)]
TESTED = ["int4-g32", "int4-g64-asym", "int5-g32-asym", "int8-channel"]


def heavy_tailed(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return (rng.standard_t(3, shape) * 0.02).astype(np.float32)


def error(matrix, weight, power: float) -> float:
    return float((np.abs(matrix.dequantize().astype(np.float64) - weight) ** power).sum())


@pytest.mark.parametrize("beta", [0.5, 2.0, 10.0])
def test_the_shrinkage_is_that_of_the_paper(beta, random_generator):
    x = random_generator.standard_normal(200)
    for power in (0.4, 0.7):
        wanted = np.sign(x) * np.maximum(np.abs(x) - np.abs(x) ** (power - 1) / beta, 0)
        np.testing.assert_allclose(shrink(torch.from_numpy(x), beta, power).numpy(), wanted, atol=1e-12)
    candidates = np.linspace(-5, 5, 20001)  # p = 1: argmin |e| + beta / 2 (e - x)^2, by looking at all e
    best = candidates[(np.abs(candidates) + beta / 2 * (candidates - x[:, None]) ** 2).argmin(1)]
    np.testing.assert_allclose(shrink(torch.from_numpy(x), beta, 1.0).numpy(), best, atol=6e-4)
    assert shrink(torch.zeros(3), beta, 0.7).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TESTED)
def test_its_error_is_never_above_that_of_rounding(name, shape, random_generator):
    spec, weight = FORMATS.get(name), heavy_tailed(random_generator, shape)
    for fit, rule in (("line", "mse"), ("minimum", "absmax")):
        found = quantize_hqq(weight, spec, HqqSettings(weights=name, fit=fit))
        assert error(found, weight, 0.7) <= error(quantize_rtn(weight, spec, scale=rule), weight, 0.7) * (1 + 1e-6)
        again = codes_for(weight, found.scales, found.minima, spec)
        np.testing.assert_array_equal(found.codes, again)


def best_of_all_grids(weight: np.ndarray, symmetric: bool) -> np.ndarray:
    """(rows,) least sum |w - w'|^0.7 of 4-bit grids with all steps (and minima) of a fine raster."""
    low, high = (-8, 7) if symmetric else (0, 15)
    shares = np.linspace(0.3, 1.2, 70)
    best = np.full(len(weight), np.inf)
    for bottom in [0.0] if symmetric else shares:
        for top in [*shares, *-shares] if symmetric else shares:
            shift = weight.min(1) * bottom
            step = np.abs(weight).max(1) * top / 7 if symmetric else (weight.max(1) * top - shift) / 15
            codes = np.clip(np.rint((weight - shift[:, None]) / step[:, None]), low, high)
            errors = (np.abs(codes * step[:, None] + shift[:, None] - weight) ** 0.7).sum(1)
            best = np.minimum(best, errors)
    return best


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym"])
def test_it_comes_near_the_best_of_all_grids(name, random_generator):
    spec, weight = FORMATS.get(name), heavy_tailed(random_generator, (600, 32))
    best = float(best_of_all_grids(weight, spec.symmetric).sum())
    found = error(quantize_hqq(weight, spec, HqqSettings(weights=name)), weight, 0.7)
    assert found <= 1.2 * best
    assert found - best < 0.8 * (error(quantize_rtn(weight, spec), weight, 0.7) - best)


def test_the_scheme_needs_no_text_and_names_the_tensor_that_does_not_fit(tiny_model):
    model = tiny_model(seed=3)
    made = apply_recipe(model, scheme_to_recipe("W4A8-g32-asym-hqq-e8"), Build(threads=1))
    assert made.format_of("layers.0.ffn.down.weight") == "int4-g32-asym"
    assert made.linear("layers.0.ffn.down.weight").activation == "int8-g32"
    broken = model.with_tensors({"layers.1.ffn.up.weight": model.tensor("layers.1.ffn.up.weight") * np.nan})
    with pytest.raises(RecipeError, match=r"layers\.1\.ffn\.up\.weight"):
        apply_recipe(broken, scheme_to_recipe("W4A8-g32-hqq"), Build(threads=1))
