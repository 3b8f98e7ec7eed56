"""AWQ: the function stays, the error that it searches falls, scales are the paper's; and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats import FORMATS
from trilemma.formats.quantize import quantize_rtn
from trilemma.runtime.reference import round_int8_groups, round_int8_shared
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.quantize.awq import AwqSettings, channel_scales, clipped, output_error
from trilemma.techniques.quantize.folding import Fold, folds
from trilemma.techniques.schemes import scheme_to_recipe


def awq(**settings: object) -> Recipe:
    return Recipe(steps=(Step(technique="awq", settings={"weights": "int4-g32", **settings}),))


@pytest.mark.parametrize("sizes", [{}, {"qkv_bias": True, "kv_heads": 1}, {"kv_heads": 2, "tied": False}])
def test_the_function_stays_the_same(tiny_model, tokens, logits, sizes):
    model = tiny_model(seed=int(tokens[0, 0]), **sizes)
    made = apply_recipe(model, awq(), Build(calibration=tokens, threads=1))
    before, after = logits(model, tokens[:2]), logits(made, tokens[:2])
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())
    changed = {name for name in model if not np.array_equal(model.tensor(name), made.tensor(name))}
    assert any(name.endswith("o.weight") for name in changed)
    assert any(name.endswith("norm.weight") for name in changed)
    assert not any(name.startswith("embedding") for name in changed)


def test_scales_are_those_of_the_paper():
    active = np.array([0.1, 1, 10, 0], np.float32)
    plain = channel_scales(active, None, 0.5)[:3]
    np.testing.assert_allclose(plain / plain[1], np.sqrt([0.1, 1, 10]), rtol=1e-5)
    heavy = np.array([1, 4, 1, 1], np.float32)
    duo = channel_scales(active, heavy, 0.5)[:3]
    np.testing.assert_allclose(duo / duo[0], np.sqrt([1, 10 / 4, 100]), rtol=1e-5)
    assert np.isfinite(channel_scales(active, heavy, 1.0)).all()
    np.testing.assert_array_equal(channel_scales(active, None, 0.0), np.ones(4))


@pytest.mark.parametrize(("activations", "queries"), [("f32", 1), ("int8-g32", 3)])
def test_the_error_that_it_searches_is_that_of_the_rounded_product(activations, queries, random_generator):
    place = Fold(("v",), ("a", "b"), (2, queries, 32))
    columns = 64 * queries
    x = random_generator.standard_normal((50, columns)).astype(np.float32)
    weights = {name: random_generator.standard_normal((9, columns)).astype(np.float32) for name in "ab"}
    scales = np.exp(random_generator.standard_normal(64)).astype(np.float32)
    formats = {"a": FORMATS.get("int4-g32"), "b": FORMATS.get("int8-g32")}
    settings = AwqSettings(weights="int4-g32", activations=activations, scale="absmax")
    found = output_error(torch.from_numpy(x), weights, scales, place, formats, settings)
    of_column = np.array([scales[at // (32 * queries) * 32 + at % 32] for at in range(columns)])
    wanted = 0.0
    for name, rounding in (("a", round_int8_shared), ("b", round_int8_groups)):
        inputs = x / of_column
        if activations == "int8-g32":
            inputs = rounding(torch.from_numpy(inputs)).numpy()
        rounded = quantize_rtn(weights[name] * of_column, formats[name]).dequantize()
        wanted += float(((inputs @ rounded.T - x @ weights[name].T) ** 2).sum())
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g64-asym"])
def test_clipping_takes_the_best_share_of_each_group(name, random_generator):
    spec = FORMATS.get(name)
    weight = (random_generator.standard_t(3, (6, 70)) * 0.02).astype(np.float32)
    x = (random_generator.standard_normal((40, 70)) * np.exp(random_generator.standard_normal(70))).astype(np.float32)
    found = clipped(weight, 2 * x.T @ x / len(x), spec, "absmax")
    size = spec.group_size(70)
    for row in range(6):
        for first in range(0, 70, size):
            part = slice(first, first + size)
            group, inputs = weight[row : row + 1, part], x[:, part]
            errors = []
            for share in np.linspace(1, 0.5, 11, dtype=np.float32):
                bound = np.abs(group).max() * share
                rounded = quantize_rtn(np.clip(group, -bound, bound), spec).dequantize()
                errors.append(float((((rounded - group) @ inputs.T) ** 2).sum()))
            rounded = quantize_rtn(np.ascontiguousarray(found[row : row + 1, part]), spec).dequantize()
            assert float((((rounded - group) @ inputs.T) ** 2).sum()) == pytest.approx(min(errors), rel=1e-2)
    assert not np.array_equal(found, weight)


def test_every_place_of_a_layer_is_known(tiny_model):
    places = list(folds(tiny_model(kv_heads=2, qkv_bias=True).config, 1))
    assert [[name.split(".", 2)[2] for name in place.readers] for place in places] == [
        ["attention.q.weight", "attention.k.weight", "attention.v.weight"], ["attention.o.weight"],
        ["ffn.gate.weight", "ffn.up.weight"], ["ffn.down.weight"],
    ]  # fmt: skip
    assert [name.split(".", 2)[2] for name in places[1].writers] == ["attention.v.weight", "attention.v.bias"]


def test_a_scheme_hands_it_the_formats_of_the_part_that_follows():
    first, second = scheme_to_recipe("awq+W4A16-g128-gptq").steps
    assert (first.technique, second.technique) == ("awq", "gptq")
    assert first.settings == second.settings
    for name in ("awq", "W4A8-g32+awq", "awq+bf16"):
        with pytest.raises(RecipeError, match="W part"):
            scheme_to_recipe(name)


def test_packed_weights_are_refused(tiny_model, tokens):
    packed = apply_recipe(tiny_model(), scheme_to_recipe("W8A8"), Build())
    with pytest.raises(RecipeError, match="quantize afterwards"):
        apply_recipe(packed, awq(), Build(calibration=tokens))
