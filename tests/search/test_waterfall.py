"""A waterfall's last step is the recipe's own result; its picture adds up."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from trilemma.core.errors import InputError, RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats.artifact import read_artifact
from trilemma.report.waterfall import bars, waterfall_plot
from trilemma.search.predict import predict_bytes
from trilemma.search.waterfall import read_any_recipe, waterfall
from trilemma.techniques.apply import compress
from trilemma.techniques.schemes import scheme_to_recipe

FEW = {"prompt_tokens": 8, "output_tokens": 4, "repetitions": 3, "threads": 1}


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A bare config.json of a small Llama."""
    folder = tmp_path_factory.mktemp("shape")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 96, "intermediate_size": 160,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 211,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_twins_cost_what_arithmetic_says(shape):
    from trilemma.formats.artifact import load_any

    found = waterfall(shape, "W4A8-g32-kv8", **FEW)
    assert found.twin
    assert [step.name for step in found.steps] == ["unmodified", "rtn int4-g32", "kv-cache int8"]
    recipe = scheme_to_recipe("W4A8-g32-kv8")
    model = load_any(shape)
    for step, count in zip(found.steps, range(3), strict=True):
        prefix = recipe.model_copy(update={"steps": recipe.steps[:count]})
        expected = predict_bytes(model, prefix, 12).weights_bytes
        assert step.measurements["weights_bytes"].value == pytest.approx(expected, rel=0.02)
    assert found.steps[1].ratios["weights_bytes"][0] < 0.5
    assert found.steps[2].ratios["weights_bytes"] == (1, 1, 1)
    assert "kl_mean" not in found.steps[1].measurements


def test_lengths_are_checked_before_anything_is_built(shape, monkeypatch):
    monkeypatch.setattr("trilemma.search.waterfall.cost_twin", lambda *_: pytest.fail("built"))
    with pytest.raises(InputError, match="more than the 64"):
        waterfall(shape, "W4A8-g32", prompt_tokens=60, output_tokens=5)


def test_quality_goes_with_real_weights_and_the_last_step_is_the_recipe(hearth_path, texts_path, tmp_path):
    recipe = Recipe(name="two", steps=(
        Step(technique="rtn", settings={"weights": "int8-g32"}),
        Step(technique="rtn", settings={"weights": "int4-g32"}),
    ))  # fmt: skip
    found = waterfall(hearth_path, recipe, data=[texts_path], quality_tokens=1024, **FEW)
    kl = found.values("kl_mean")
    assert kl[0] < kl[1] < kl[2]
    compress(hearth_path, tmp_path / "out", recipe=recipe)
    again = waterfall(hearth_path, tmp_path / "out", **FEW)
    assert again.values("weights_bytes") == found.values("weights_bytes")
    made = read_artifact(tmp_path / "out")
    assert made.format_of("layers.0.ffn.up.weight") == "int4-g32"
    picture = waterfall_plot(found)
    assert picture.startswith("<svg")
    assert all(name in picture for name in ("Weights", "KL divergence", "before", "after"))
    assert not re.search(r"NaN|nan|inf", picture)


def test_bars_join_up(random_generator):
    values = list(random_generator.uniform(1, 9, 5))
    drawn = bars(values)
    assert len(drawn) == len(values) + 1
    assert drawn[0][1] == values[0]
    assert drawn[-1][1] == values[-1]
    changes = [end - start for start, end, kind in drawn if kind != "whole"]
    assert np.sum(changes) == pytest.approx(values[-1] - values[0])
    assert all((end <= start) == (kind == "less") for start, end, kind in drawn if kind != "whole")


def test_recipes_that_can_not_be_attributed_are_refused(hearth_path, tmp_path):
    (tmp_path / "r.yaml").write_text("version: 1\nsteps: []\n")
    with pytest.raises(RecipeError, match="no steps"):
        read_any_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="--data"):
        waterfall(hearth_path, "W4A8-g32-gptq", **FEW)
    with pytest.raises(RecipeError, match="scheme"):
        read_any_recipe("W5")
