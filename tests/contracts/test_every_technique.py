"""What every registered technique promises: input unchanged, same seed same result, settings that survive YAML,
a truthful `supports`, and an output that saves, loads and generates.

A new technique adds one line to EXAMPLES; without it the first test fails.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from trilemma.core.errors import RecipeError, UnsupportedModelError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats.artifact import read_artifact, write_artifact
from trilemma.model.model import Model
from trilemma.runtime import EngineOptions, SamplingSettings, open_engine
from trilemma.techniques import TECHNIQUES, Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.technique import read_settings

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "plain": [{"dtype": "bf16"}, {"dtype": "f16"}],
    "rtn": [{"weights": "int4-g32"}, {"weights": "int8-channel", "activations": "bf16"}],
    "hqq": [{"weights": "int4-g32-asym"}, {"weights": "int4-g64", "fit": "minimum"}],
    "gptq": [{"weights": "int4-g32-asym"}, {"weights": "int4-g64", "embedding": "int4-g32"}],
    "gptaq": [{"weights": "int4-g32-asym", "guided": True, "rows": 20}, {"weights": "int4-g64", "refits": 0}],
    "sign-rounding": [
        {"weights": "int4-g32", "steps": 3},
        {"weights": "int4-g32-asym", "steps": 2, "start": "nearest"},
    ],
    "eora": [{"rank": 5}, {"rank": 3, "format": "bf16", "guided": True, "pull": 0.5}],
    "rotate": [{}, {"tied": "untie"}],
    "awq": [{"weights": "int4-g32", "grid": 4}, {"weights": "int4-g64", "grid": 3, "duo": False}],
    "tune-norms": [{"steps": 3}, {"steps": 2, "batch_size": 2}],
    "tune-scales": [{"steps": 3}, {"steps": 2, "embedding": False}],
    "experts": [{"count": 4, "active": 2, "multiple": 4}, {"count": 3, "active": 1, "multiple": 4, "router": "glu"}],
    "smooth": [{}, {"strength": 0.75}],
    "heal": [{"steps": 3, "context": 16}, {"steps": 2, "keep_top": 8, "teacher_weight": 0.5}],
    "distill": [{"steps": 2, "batch_size": 2}, {"steps": 2, "layers": 1, "divergence": "skewed"}],
    "prune-width": [
        {"share": 0.3, "multiple": 8},
        {"share": 0.3, "parts": "ffn", "multiple": 4, "compensation": "affine", "allocation": "uniform"},
    ],
    "prune-depth": [{"share": 0.5}, {"share": 0.4, "unit": "parts"}],
    "magnitude": [{"share": 0.5}, {"pattern": "2:4"}],
    "wanda": [{"share": 0.5}, {"pattern": "4:8", "update": True}],
    "kv-heads": [{"heads": 1}],
    "kv-cache": [{"precision": "int8"}, {"precision": "none"}],
}
BEFORE = {"eora": (Step(technique="rtn", settings={"weights": "int4-g32"}),)}  # what must stand before it
MODELS: list[dict[str, Any]] = [
    {},
    {"qkv_bias": True, "tied": False, "dim": 40, "head_dim": 10, "ffn": 52, "kv_heads": 1},
]
SMALL = [(name, settings) for name, examples in EXAMPLES.items() for settings in examples[:1]]
FULL = [(name, settings) for name, examples in EXAMPLES.items() for settings in examples[1:]]
CASES = [(*case, MODELS[0]) for case in SMALL] + [
    pytest.param(*case, sizes, marks=pytest.mark.full)
    for sizes in MODELS
    for case in SMALL + FULL
    if not (case in SMALL and sizes is MODELS[0])
]


def fingerprint(model: Model) -> dict[str, str]:
    """A digest of everything that a technique could have changed, by tensor."""
    found = {}
    for name in model:
        digest = hashlib.sha256(model.tensor(name).tobytes())
        digest.update(f"{model.format_of(name)} {model.linear(name)} {model.run} {model.config}".encode())
        found[name] = digest.hexdigest()
    return found


def calibration(model: Model) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (6, 32)).astype(np.int32)


def test_every_technique_has_an_example():
    assert set(TECHNIQUES.names()) <= set(EXAMPLES), "add an example of the new technique's settings"


@pytest.mark.parametrize("name", TECHNIQUES.names())
def test_it_explains_itself_and_refuses_unknown_settings(name):
    technique = TECHNIQUES.get(name)()
    assert technique.name == name
    assert technique.what
    assert all(field.description for field in technique.Settings.model_fields.values())
    with pytest.raises(RecipeError, match="no_such_setting"):
        read_settings(technique, {**EXAMPLES[name][0], "no_such_setting": 1})


@pytest.mark.parametrize(("name", "settings"), SMALL + FULL)
def test_settings_survive_yaml(name, settings):
    technique = TECHNIQUES.get(name)()
    wanted = read_settings(technique, settings)
    recipe = Recipe(steps=(Step(technique=name, settings=wanted.model_dump(mode="json")),))
    again = Recipe.from_yaml(recipe.to_yaml())
    assert read_settings(technique, again.steps[0].settings) == wanted


@pytest.mark.parametrize(("name", "settings", "sizes"), CASES)
def test_input_unchanged_same_seed_same_result_and_the_output_lives(name, settings, sizes, tiny_model, tmp_path):
    model = tiny_model(seed=1, **sizes)
    before = fingerprint(model)
    recipe = Recipe(seed=3, steps=(*BEFORE.get(name, ()), Step(technique=name, settings=settings)))
    build = Build(calibration=calibration(model), seed=3)
    if TECHNIQUES.get(name)().supports(model.config) is not None:
        with pytest.raises(UnsupportedModelError, match=name):
            apply_recipe(model, recipe, build)
        return
    made = apply_recipe(model, recipe, build)
    assert fingerprint(model) == before, "the input was changed"
    assert fingerprint(made) != before, "nothing was done"
    assert fingerprint(apply_recipe(model, recipe, build)) == fingerprint(made), "the same seed gave another result"

    write_artifact(made, tmp_path / "artifact", recipe)
    opened = read_artifact(tmp_path / "artifact")
    for tensor in made:
        np.testing.assert_array_equal(opened.tensor(tensor), made.tensor(tensor), err_msg=tensor)
        assert opened.linear(tensor) == made.linear(tensor)
    assert opened.run == made.run
    engine = open_engine(opened, options=EngineOptions(threads=1))
    generation = engine.generate([1, 2, 3], SamplingSettings(max_tokens=5))
    logits = engine.logits([1, 2, 3])
    engine.close()
    assert len(generation.tokens) == 5
    assert np.isfinite(logits).all()
