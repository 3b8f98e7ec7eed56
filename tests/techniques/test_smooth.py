"""Smoothing changes no result, evens out what is rounded, and repairs int8 activations of a model with outliers."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.quantize.smooth import channel_scales
from trilemma.techniques.schemes import scheme_to_recipe

READERS = {"attention_norm": "attention.q attention.k attention.v", "ffn_norm": "ffn.gate ffn.up"}
SMOOTH = Recipe(steps=(Step(technique="smooth", settings={}),))


def with_outliers(model, generator):
    """Some gains of every norm and rows of v and up times 64, undone by what reads them: the same function."""
    changed = {}
    spec = model.config.layers[0].attention
    for index in range(len(model.config.layers)):
        p = f"layers.{index}"
        for norm, readers in (
            ("attention_norm", "attention.q attention.k attention.v"),
            ("ffn_norm", "ffn.gate ffn.up"),
        ):
            scales = np.ones(model.config.dim, np.float32)
            scales[generator.choice(len(scales), 3, replace=False)] = 64
            changed[f"{p}.{norm}.weight"] = model.tensor(f"{p}.{norm}.weight") * scales
            for reader in readers.split():
                name = f"{p}.{reader}.weight"
                changed[name] = model.tensor(name) / scales
        rows = np.ones((spec.kv_heads, spec.head_dim), np.float32)
        rows[0, 1] = 64
        v, o = f"{p}.attention.v", f"{p}.attention.o.weight"
        changed[f"{v}.weight"] = changed[f"{v}.weight"] * rows.reshape(-1, 1)
        if spec.qkv_bias:
            changed[f"{v}.bias"] = model.tensor(f"{v}.bias") * rows.reshape(-1)
        changed[o] = model.tensor(o) / np.repeat(rows, spec.heads // spec.kv_heads, axis=0).reshape(1, -1)
    return model.with_tensors(changed)


@pytest.mark.parametrize("biased", [False, True])
def test_the_function_stays_the_same_to_the_bit(tiny_model, random_generator, biased, engine_logits):
    model = tiny_model(seed=int(random_generator.integers(1000)), qkv_bias=biased, kv_heads=1 if biased else 2)
    tokens = random_generator.integers(0, 97, (8, 32)).astype(np.int32)
    smoothed = apply_recipe(model, SMOOTH, Build(calibration=tokens, threads=1))
    np.testing.assert_array_equal(engine_logits(model, tokens[0]), engine_logits(smoothed, tokens[0]))
    assert any(not np.array_equal(model.tensor(name), smoothed.tensor(name)) for name in model)


def test_it_repairs_int8_with_outliers(tiny_model, random_generator, engine_logits):
    model = with_outliers(tiny_model(seed=int(random_generator.integers(1000))), random_generator)
    tokens = random_generator.integers(0, 97, (16, 32)).astype(np.int32)
    build = Build(calibration=tokens, threads=1)
    wanted = engine_logits(model, tokens[0])
    w8a8 = scheme_to_recipe("W8A8-g32")
    plain = np.abs(engine_logits(apply_recipe(model, w8a8, build), tokens[0]) - wanted).mean()
    both = Recipe(steps=(*SMOOTH.steps, *w8a8.steps))
    smoothed = np.abs(engine_logits(apply_recipe(model, both, build), tokens[0]) - wanted).mean()
    assert smoothed < 0.5 * plain


def test_scales_are_powers_of_two_and_follow_the_paper():
    largest, readers = np.array([1, 100, 0, 4], np.float32), np.array([1, 0.5, 1, 1], np.float32)
    scales = channel_scales(largest, readers, 0.5)
    wanted = np.sqrt(largest / readers)[[0, 1, 3]]
    ratio = scales[[0, 1, 3]] / wanted
    assert scales[2] == 1
    assert np.all(np.exp2(np.round(np.log2(scales))) == scales)
    assert ratio.max() / ratio.min() <= 2.001  # one common factor, and each rounded to a power of two
    assert np.all(channel_scales(largest, readers, 0.0)[[0, 3]] == channel_scales(largest, readers, 0.0)[0])


def test_packed_weights_are_refused(tiny_model, random_generator):
    tokens = random_generator.integers(0, 97, (4, 32)).astype(np.int32)
    packed = apply_recipe(tiny_model(), scheme_to_recipe("W8A8"), Build())
    with pytest.raises(RecipeError, match="quantize afterwards"):
        apply_recipe(packed, SMOOTH, Build(calibration=tokens))
