"""Schemes, formats by tensor, recipes checked before work starts, and `compress`."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import OutputError, RecipeError, UnknownNameError, UnsupportedModelError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats.artifact import read_artifact, read_recipe
from trilemma.model.config import DecoderConfig, LayerSpec
from trilemma.model.model import Model
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe, check_recipe, compress, needs_calibration
from trilemma.techniques.quantize.assignment import WeightSettings, assign_formats, assign_runs
from trilemma.techniques.schemes import SCHEMES, list_schemes, scheme_to_recipe


def test_every_recommended_scheme_is_a_recipe_that_passes_the_checks(tiny_model):
    config = tiny_model(dim=128, heads=8, kv_heads=4, head_dim=16, ffn=768).config
    for name, line in list_schemes().items():
        recipe = scheme_to_recipe(name, seed=4)
        assert (recipe.name, recipe.seed) == (name, 4)
        check_recipe(recipe, config)
        assert needs_calibration(recipe, config) or not any(
            word in name for word in ("gptq", "gptaq", "guided", "prune", "wanda", "heal")
        )
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        assert line


@pytest.mark.parametrize(
    ("name", "technique", "settings"),
    [
        ("W8A8", "rtn", {"weights": "int8-channel", "embedding": "int8-channel", "activations": "int8-g32"}),
        ("W8A16", "rtn", {"weights": "int8-channel", "embedding": "int8-channel", "activations": "bf16"}),
        ("w8a8-g128", "rtn", {"weights": "int8-g128", "embedding": "int8-g128", "activations": "int8-g32"}),
        ("W4A8-g32", "rtn", {"weights": "int4-g32", "embedding": "int8-g32", "activations": "int8-g32"}),
        ("W4A16-g128-gptq", "gptq", {"weights": "int4-g128", "embedding": "int8-g32", "activations": "bf16"}),
        ("W8A16-g32-gptq-e4", "gptq", {"weights": "int8-g32", "embedding": "int4-g32", "activations": "bf16"}),
        ("W5A8-k-guided", "gptaq",
         {"weights": "int5-g32-k", "embedding": "int8-g32", "activations": "int8-g32", "guided": True}),
        ("W4A8-g64-gptaq", "gptaq", {"weights": "int4-g64", "embedding": "int8-g32", "activations": "int8-g32"}),
        ("W4A8-g32-guided", "gptaq",
         {"weights": "int4-g32", "embedding": "int8-g32", "activations": "int8-g32", "guided": True}),
        ("W4A8-g32-e16", "rtn", {"weights": "int4-g32", "embedding": "bf16", "activations": "int8-g32"}),
        ("W4A8-k-gptq", "gptq", {"weights": "int4-g32-k", "embedding": "int8-g32", "activations": "int8-g32"}),
        ("W5A16-k-e6", "rtn", {"weights": "int5-g32-k", "embedding": "int6-g16-k", "activations": "bf16"}),
        ("w6a8-k-e4", "rtn", {"weights": "int6-g16-k", "embedding": "int4-g32-k", "activations": "int8-g32"}),
    ],
)  # fmt: skip
def test_schemes_mean_what_they_say(name, technique, settings):
    (step,) = scheme_to_recipe(name).steps
    assert (step.technique, step.settings) == (technique, settings)


def test_suffixes_come_in_any_order_and_floating_schemes_too():
    kv = Step(technique="kv-cache", settings={"precision": "int8"})
    assert scheme_to_recipe("W4A8-g32-kv8-e4").steps == scheme_to_recipe("W4A8-g32-e4-kv8").steps
    assert scheme_to_recipe("W4A8-g32-kv8").steps[1] == kv
    assert scheme_to_recipe("W4A8-k-kv8").steps[1] == kv
    assert scheme_to_recipe("bf16-kv4").steps[1].settings["precision"] == "int4"
    assert scheme_to_recipe("bf16-kv8").steps == (Step(technique="plain", settings={"dtype": "bf16"}), kv)


@pytest.mark.parametrize(
    "name",
    ["", "W4", "W7A8-g32", "W4A8", "W8A8-g64", "W4A4-g32", "W4A8-g32-awq", "W4A8-g32-e3", "W8A8-kv5", "W8A8-asym",
     "W8A8+W4A8-g32", "W8A8-k", "W4A8-k-asym", "W4A8-k-hqq", "W4A8-g32-k", "W4A8-g32-e6"],
)  # fmt: skip
def test_unknown_schemes_are_answered_with_valid_ones(name):
    with pytest.raises(RecipeError, match=r"Unknown scheme .*W4A8-g32-gptq"):
        scheme_to_recipe(name)


def test_formats_by_tensor(tiny_model):
    config = tiny_model(tied=False).config
    settings = WeightSettings(
        weights="int4-g64", overrides={"*.ffn.down.weight": "int8-g32", "layers.1.*": "bf16", "head.weight": "f32"}
    )
    found = {name: spec.name for name, spec in assign_formats(config, settings).items()}
    assert found["embedding.weight"] == "int8-g32"
    assert found["head.weight"] == "f32"
    assert found["layers.0.attention.q.weight"] == "int4-g64"
    assert found["layers.0.ffn.down.weight"] == "int8-g32"
    assert found["layers.1.ffn.down.weight"] == found["layers.1.attention.q.weight"] == "bf16"
    runs = assign_runs(config, assign_formats(config, settings), "int8-g32")
    assert "embedding.weight" not in runs
    assert runs["head.weight"].activation == "f32"
    assert runs["layers.0.ffn.down.weight"].activation == "int8-g32"
    assert runs["layers.1.ffn.down.weight"].activation == "bf16"


def test_a_tied_embedding_is_one_matrix_with_the_heads_activations(tiny_model):
    model = tiny_model(tied=True)
    made = apply_recipe(model, scheme_to_recipe("W4A8-g32-e4"), Build())
    assert made.format_of("embedding.weight") == "int4-g32"
    assert made.linear("embedding.weight").activation == "int8-g32"


def test_an_override_that_matches_nothing_is_refused(tiny_model):
    recipe = Recipe(
        steps=(Step(technique="rtn", settings={"weights": "int4-g32", "overrides": {"layer.0.*": "bf16"}}),)
    )
    with pytest.raises(RecipeError, match=r"'layer\.0\.\*' matches no matrix"):
        apply_recipe(tiny_model(), recipe, Build())


def test_rows_that_do_not_fit_two_levels_of_scales_get_one(tiny_model):
    model, said = tiny_model(dim=256, head_dim=64, ffn=160, tied=False), []
    settings = {"weights": "int4-g32-k", "embedding": "int6-g16-k"}
    build = Build(progress=lambda done, total, what: said.append(what))
    made = apply_recipe(model, Recipe(steps=(Step(technique="rtn", settings=settings),)), build)
    assert made.format_of("layers.0.ffn.up.weight") == "int4-g32-k"
    assert made.format_of("layers.0.ffn.down.weight") == "int4-g32-asym"
    assert made.format_of("embedding.weight") == "int6-g16-k"
    assert [line for line in said if "160 are no multiple of 256" in line and "int4-g32-asym" in line]
    narrow = tiny_model(dim=64, head_dim=16, ffn=256).config
    found = assign_formats(narrow, WeightSettings(weights="int5-g32-k", embedding="int6-g16-k"))
    assert found["embedding.weight"].name == "int8-g32"
    assert found["layers.0.ffn.down.weight"].name == "int5-g32-k"
    assert found["layers.0.ffn.up.weight"].name == "int5-g32-asym"


def test_an_override_that_does_not_fit_its_rows_is_refused_by_the_tensors_name(tiny_model):
    settings = WeightSettings(weights="int4-g32", overrides={"*.down.weight": "int4-g32-k"})
    with pytest.raises(RecipeError, match=r"layers\.0\.ffn\.down\.weight.* 160, .*256 .*int4-g32-asym"):
        assign_formats(tiny_model(dim=256, head_dim=64, ffn=160).config, settings)


class Untouchable:
    """A source that must not be read."""

    def stored_dtype(self, name):
        return "f32"

    def read(self, name):
        raise AssertionError(f"work started: {name} was read")


@pytest.mark.parametrize(
    ("last", "error", "why"),
    [
        (Step(technique="rtn", settings={"weights": "int5"}), RecipeError, "int5"),
        (Step(technique="rtn", settings={"weights": "int4-g32", "group": 32}), RecipeError, "group"),
        (Step(technique="rtn", settings={}), RecipeError, "weights"),
        (Step(technique="gptq", settings={"weights": "int4-g32", "damping": 0}), RecipeError, "damping"),
        (Step(technique="nf4", settings={}), UnknownNameError, "gptq"),
        (Step(technique="gptq", settings={"weights": "int4-g32"}), RecipeError, "--data"),
    ],
)
def test_every_step_is_checked_before_work_starts(last, error, why, tiny_model):
    model = Model(tiny_model().config, Untouchable())
    recipe = Recipe(steps=(Step(technique="rtn", settings={"weights": "int8-g32"}), last))
    with pytest.raises(error, match=why):
        apply_recipe(model, recipe, Build())


def test_a_technique_that_does_not_fit_the_model_is_refused(tiny_model):
    config = tiny_model().config
    bare = DecoderConfig(**{**dict(config), "layers": (LayerSpec(attention=None, ffn=config.layers[0].ffn),)})
    with pytest.raises(UnsupportedModelError, match="no attention"):
        check_recipe(scheme_to_recipe("W8A8-kv8"), bare)


def test_errors_name_the_tensor(tiny_model):
    model = tiny_model()
    bad = model.tensor("layers.1.ffn.up.weight").copy()
    bad[3, 4] = np.nan
    with pytest.raises(RecipeError, match=r"layers\.1\.ffn\.up\.weight.*NaN"):
        apply_recipe(model.with_tensors({"layers.1.ffn.up.weight": bad}), scheme_to_recipe("W8A8"), Build())


def test_compress_writes_an_artifact_and_replaying_its_recipe_gives_the_same_bytes(hearth_path, texts_path, tmp_path):
    steps = []
    settings = {"weights": "int4-g128", "overrides": {"layers.0.*": "int8-g32"}, "activations": "int8-g32"}
    recipe = Recipe(name="replay", seed=3, steps=(Step(technique="rtn", settings=settings),))
    first = compress(hearth_path, tmp_path / "a", recipe=recipe, progress=lambda *args: steps.append(args))
    compress(hearth_path, tmp_path / "b", recipe=tmp_path / "a" / "recipe.yaml")
    for file in ("model.safetensors", "trilemma.json", "recipe.yaml"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert read_recipe(tmp_path / "a") == recipe
    assert first.weights_bytes < 0.45 * first.original_weights_bytes
    assert read_artifact(tmp_path / "a").format_of("layers.0.ffn.up.weight") == "int8-g32"
    assert steps
    assert all(done <= total and what for done, total, what in steps)
    with pytest.raises(OutputError, match="--force"):
        compress(hearth_path, tmp_path / "a", scheme="W8A8")
    compress(hearth_path, tmp_path / "a", scheme="W8A8", force=True)
    assert read_artifact(tmp_path / "a").format_of("layers.0.ffn.up.weight") == "int8-channel"


def test_gptq_of_the_shipped_model_gives_the_same_bytes_twice(hearth_path, random_generator, tmp_path):
    windows = random_generator.integers(0, 8192, (4, 64)).astype(np.int32)
    for out in ("a", "b"):
        compress(hearth_path, tmp_path / out, scheme="W4A8-g32-gptq", calibration=windows, seed=1, threads=2)
    for file in ("model.safetensors", "trilemma.json", "recipe.yaml"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with pytest.raises(RecipeError, match="--data"):
        compress(hearth_path, tmp_path / "c", scheme="W4A8-g32-gptq")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("given", [{}, {"scheme": "W8A8", "recipe": Recipe()}])
def test_compress_wants_one_of_scheme_and_recipe(given, hearth_path, tmp_path):
    with pytest.raises(RecipeError, match="one of a scheme"):
        compress(hearth_path, tmp_path / "out", **given)


def test_a_recipe_that_can_not_be_read_is_refused(hearth_path, tmp_path):
    with pytest.raises(RecipeError, match="Can not read the recipe"):
        compress(hearth_path, tmp_path / "out", recipe=tmp_path / "nothing.yaml")
    assert len(SCHEMES) > 5
