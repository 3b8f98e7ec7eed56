"""Ours: what a word on the command line means, and the same recipe with other formats at its ends.

A word is a scheme (W4A8-g32-guided+scales100), the path of a recipe.yaml (MODEL=PATH for one model alone), or
METHOD:LAYERS/EMBEDDING, scheme parts before or behind (smooth+guided:int4-g64/int5-g32-k+scales100), for what schemes
can not name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trilemma.core.errors import InputError
from trilemma.core.recipe import Recipe, Step
from trilemma.techniques.schemes import scheme_to_recipe

ENDS = ("embedding.weight", "head.weight")
METHODS = {"guided": ("gptaq", {"guided": True}), "gptaq": ("gptaq", {}), "gptq": ("gptq", {}), "rtn": ("rtn", {}),
           "sign": ("sign-rounding", {})}  # fmt: skip


def read_word(word: str, model: str) -> Recipe | None:
    """The recipe of one word; None where it is for another model.

    Raises:
        InputError: a method that is none; RecipeError: a scheme or file that can not be read.
    """
    only, given, path = word.rpartition("=")
    if given and only != model:
        return None
    if Path(path).suffix in (".yaml", ".yml", ".json"):
        recipe = _from_json(Path(path)) if path.endswith(".json") else Recipe.read(path)
        return recipe if recipe.name else recipe.model_copy(update={"name": Path(path).stem})
    if ":" not in path:
        return scheme_to_recipe(path)
    parts = path.split("+")
    at = next(number for number, part in enumerate(parts) if ":" in part)
    method, _, formats = parts[at].partition(":")
    if method not in METHODS or formats.count("/") != 1:
        raise InputError(f"'{word}' is no METHOD:LAYERS/EMBEDDING; methods: {', '.join(METHODS)}.")
    layers, embedding = formats.split("/")
    technique, settings = METHODS[method]
    step = Step(technique=technique, settings={"weights": layers, "embedding": embedding, **settings})
    before, behind = (_steps(some) for some in (parts[:at], parts[at + 1 :]))
    return Recipe(name=path, steps=(*before, step, *behind))


def _steps(parts: list[str]) -> tuple[Step, ...]:
    return scheme_to_recipe("+".join(parts)).steps if parts else ()


def _from_json(path: Path) -> Recipe:
    return Recipe.model_validate(json.loads(path.read_text(encoding="utf-8")))


def with_ends(recipe: Recipe, embedding: str, head: str | None = None) -> Recipe:
    """The same recipe with these formats for embedding and head."""
    ends = {"embedding": embedding, "head": head or embedding}
    return _changed(recipe, lambda settings: {**settings, **ends, "overrides": _inside(settings)})


def with_formats(recipe: Recipe, formats: Mapping[str, str]) -> Recipe:
    """The same recipe with a format for each tensor by name, as of another engine's file."""
    inside = {name: spec for name, spec in formats.items() if name not in ENDS}
    common = Counter(inside.values()).most_common(1)[0][0]
    embedding = formats["embedding.weight"]
    chosen = {"weights": common, "embedding": embedding, "head": formats.get("head.weight", embedding),
              "overrides": {name: spec for name, spec in inside.items() if spec != common}}  # fmt: skip
    return _changed(recipe, lambda settings: {**settings, **chosen})


def _inside(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: spec for name, spec in settings.get("overrides", {}).items() if name not in ENDS}


def _changed(recipe: Recipe, change: Any) -> Recipe:
    """With the settings of every step that names formats changed."""
    steps = tuple(
        step.model_copy(update={"settings": change(step.settings)}) if "weights" in step.settings else step
        for step in recipe.steps
    )
    return recipe.model_copy(update={"steps": steps})


__all__ = ["read_word", "with_ends", "with_formats"]
