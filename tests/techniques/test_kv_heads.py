"""Pooled key-value heads: equal heads pool to the same model, turned ones too, and errors shrink as they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats.artifact import read_artifact, write_artifact
from trilemma.model.cost import kv_bytes_per_token
from trilemma.runtime import EngineOptions, open_engine
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe, check_recipe, needs_calibration
from trilemma.techniques.schemes import scheme_to_recipe

D = 16


def recipe(**settings):
    return Recipe(steps=(Step(technique="kv-heads", settings=settings),))


def rotation(random_generator, size):
    return np.linalg.qr(random_generator.standard_normal((size, size)))[0].astype(np.float32)


def planes(random_generator):
    """A turn by one angle in each plane (i, i + 8) of a head: what commutes with rotary embedding."""
    angles = random_generator.uniform(0, 2 * np.pi, D // 2)
    turn = np.zeros((D, D), np.float32)
    i = np.arange(D // 2)
    turn[i, i] = turn[i + 8, i + 8] = np.cos(angles)
    turn[i, i + 8], turn[i + 8, i] = -np.sin(angles), np.sin(angles)
    return turn


def with_equal_heads(model, random_generator, pairs, *, turned):
    """The model with key-value heads that are copies, or turned copies with queries and output turned along.

    pairs: (copy, of) heads.
    """
    changed = {}
    each = model.config.layers[0].attention.heads // model.config.layers[0].attention.kv_heads
    bias = model.config.layers[0].attention.qkv_bias
    for layer in range(len(model.config.layers)):
        prefix = f"layers.{layer}.attention"
        kinds = ("weight", "bias") if bias else ("weight",)
        t = {f"{r}.{kind}": model.tensor(f"{prefix}.{r}.{kind}").copy() for r in "qkv" for kind in kinds}
        t["o.weight"] = model.tensor(f"{prefix}.o.weight").copy()
        for copy, of in pairs:
            to, source = slice(copy * D, copy * D + D), slice(of * D, of * D + D)
            keys = planes(random_generator) if turned else np.eye(D, dtype=np.float32)
            values = rotation(random_generator, D) if turned else np.eye(D, dtype=np.float32)
            for kind in kinds:
                t[f"k.{kind}"][to] = keys @ t[f"k.{kind}"][source]
                t[f"v.{kind}"][to] = values @ t[f"v.{kind}"][source]
            for head in range(copy * each, copy * each + each):
                rows = slice(head * D, head * D + D)
                for kind in kinds:
                    t[f"q.{kind}"][rows] = keys @ t[f"q.{kind}"][rows]
                t["o.weight"][:, rows] = t["o.weight"][:, rows] @ values.T
        changed |= {f"{prefix}.{name}": values for name, values in t.items()}
    return model.with_tensors(changed)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("settings", "pairs", "turned"),
    [
        ({"group": "adjacent", "merge": "mean"}, [(1, 0), (3, 2)], False),
        ({"group": "adjacent", "merge": "project"}, [(1, 0), (3, 2)], False),
        ({"group": "adjacent", "merge": "project"}, [(1, 0), (3, 2)], True),
        ({"group": "similar", "merge": "mean"}, [(3, 0), (2, 1)], False),
        ({"group": "similar", "merge": "project"}, [(2, 0), (3, 1)], True),
    ],
)
def test_pooling_heads_that_are_equal_changes_nothing(
    tiny_model, random_generator, settings, pairs, turned, bias, windows, logits
):
    seed = int(random_generator.integers(1000))
    model = tiny_model(seed=seed, heads=8, kv_heads=4, head_dim=D, qkv_bias=bias)
    model = with_equal_heads(model, random_generator, pairs, turned=turned)
    build = Build(calibration=windows(model), threads=1)
    made = apply_recipe(model, recipe(heads=2, **settings), build)
    assert {layer.attention.kv_heads for layer in made.config.layers} == {2}
    fresh = windows(model)
    torch.testing.assert_close(logits(made, fresh), logits(model, fresh), rtol=1e-3, atol=2e-3)


def test_grouping_turns_out_the_wrong_heads_would_change_much(tiny_model, random_generator, windows, logits):
    """The test above can fail: by the mean, or with the wrong neighbours, the model is another one."""
    model = tiny_model(seed=int(random_generator.integers(1000)), heads=8, kv_heads=4, head_dim=D)
    model = with_equal_heads(model, random_generator, [(2, 0), (3, 1)], turned=True)
    build, fresh = Build(calibration=windows(model), threads=1), windows(model)
    for settings in ({"group": "adjacent", "merge": "project"}, {"group": "similar", "merge": "mean"}):
        made = apply_recipe(model, recipe(heads=2, **settings), build)
        assert (logits(made, fresh) - logits(model, fresh)).abs().max() > 0.05


def test_a_projection_is_nearer_than_the_mean_for_random_heads(tiny_model, random_generator, windows, logits):
    errors = {"project": 0.0, "mean": 0.0}
    for _ in range(3):
        model = tiny_model(seed=int(random_generator.integers(1000)), heads=4, kv_heads=4, head_dim=D)
        tokens = windows(model)
        for merge in errors:
            made = apply_recipe(model, recipe(heads=2, merge=merge), Build(calibration=tokens, threads=1))
            errors[merge] += float((logits(made, tokens) - logits(model, tokens)).square().mean())
    assert errors["project"] < errors["mean"]


def test_the_cache_shrinks_and_the_native_engine_agrees(tiny_model, random_generator, tmp_path, windows, logits):
    model = tiny_model(seed=int(random_generator.integers(1000)), heads=6, kv_heads=6, head_dim=10, dim=40)
    tokens = windows(model)
    made = apply_recipe(model, scheme_to_recipe("kvheads2"), Build(calibration=tokens, threads=1))
    assert kv_bytes_per_token(made.config, "bf16") * 3 == kv_bytes_per_token(model.config, "bf16")
    write_artifact(made, tmp_path / "a", Recipe())
    engine = open_engine(read_artifact(tmp_path / "a"), options=EngineOptions(threads=1, kv_cache="f32"))
    try:
        ours = engine.logits(tokens[0].tolist())
    finally:
        engine.close()
    wanted = logits(made, tokens[:1])[0].numpy()
    np.testing.assert_allclose(ours, wanted, atol=2e-5 * np.abs(wanted).max())


def test_a_number_that_does_not_divide_is_refused_with_those_that_do(tiny_model, windows):
    model = tiny_model(heads=6, kv_heads=6)
    with pytest.raises(RecipeError, match=r"6 key-value heads.*into 4.*1, 2, 3, 6"):
        apply_recipe(model, scheme_to_recipe("kvheads4"), Build(calibration=windows(model)))


def test_adjacent_means_need_no_text(tiny_model):
    model = tiny_model(heads=4, kv_heads=4)
    plain = recipe(heads=2, group="adjacent", merge="mean")
    assert not needs_calibration(plain, model.config)
    assert check_recipe(plain, model.config)
    made = apply_recipe(model, plain, Build())
    k = model.tensor("layers.1.attention.k.weight").reshape(2, 2, D, -1)
    np.testing.assert_allclose(made.tensor("layers.1.attention.k.weight").reshape(2, D, -1), k.mean(1), rtol=1e-5)
