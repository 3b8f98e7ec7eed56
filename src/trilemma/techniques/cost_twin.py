"""A model with the shapes and formats that a recipe would leave, and random weights: for cost alone.

Quantizing a billion random weights would take minutes and change nothing about what running them costs.
Steps that choose codes (rtn, gptq) are imitated by random codes in the same formats.
"""

from __future__ import annotations

from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe
from trilemma.formats import FORMATS
from trilemma.formats.grid import Format
from trilemma.formats.random_weights import with_random_weights
from trilemma.model.model import Activation, Model
from trilemma.techniques.apply import check_recipe
from trilemma.techniques.quantize.assignment import WeightSettings, assign_formats, assign_runs
from trilemma.techniques.quantize.kv_cache import KvCacheSettings
from trilemma.techniques.quantize.plain import PlainSettings
from trilemma.techniques.technique import TechniqueSettings


def cost_twin(model: Model, recipe: Recipe, seed: int = 0) -> Model:
    """Random weights in the formats of `recipe`; costs what the real result would cost, says nothing about quality.

    Raises:
        RecipeError: wrong settings, or a step whose result can not be imitated.
        UnsupportedModelError: a technique that can not work on this model.
    """
    for step, (_, settings) in zip(recipe.steps, check_recipe(recipe, model.config), strict=True):
        if isinstance(settings, KvCacheSettings):
            model = model.with_run(model.run.model_copy(update={"kv_cache": settings.precision}))
            continue
        formats, activations = _formats(model, step.technique, settings)
        runs = assign_runs(model.config, formats, activations)
        model = with_random_weights(
            model, lambda name, chosen=formats: chosen[name].name,  # type: ignore[misc]
            activation_of=lambda name, chosen=runs: chosen[name].activation, seed=seed,  # type: ignore[misc]
        )  # fmt: skip
    return model


def recipe_formats(model: Model, recipe: Recipe) -> tuple[dict[str, str], str]:
    """Format of every matrix that the recipe changes, and the KV cache precision that it leaves. Builds nothing.

    Raises:
        RecipeError: wrong settings, or a step whose result is not known before it is done.
        UnsupportedModelError: a technique that can not work on this model.
    """
    formats, _, kv = recipe_runs(model, recipe)
    return formats, kv


def recipe_runs(model: Model, recipe: Recipe) -> tuple[dict[str, str], dict[str, Activation], str]:
    """As `recipe_formats`, with the input precision of every product between: formats, activations, KV cache.

    Raises:
        RecipeError: wrong settings, or a step whose result is not known before it is done.
        UnsupportedModelError: a technique that can not work on this model.
    """
    formats: dict[str, str] = {}
    activations: dict[str, Activation] = {}
    kv: str = model.run.kv_cache
    for step, (_, settings) in zip(recipe.steps, check_recipe(recipe, model.config), strict=True):
        if isinstance(settings, KvCacheSettings):
            kv = settings.precision
            continue
        chosen, inputs = _formats(model, step.technique, settings)
        formats |= {name: spec.name for name, spec in chosen.items()}
        activations |= {name: run.activation for name, run in assign_runs(model.config, chosen, inputs).items()}
    return formats, activations, kv


def _formats(model: Model, technique: str, settings: TechniqueSettings) -> tuple[dict[str, Format], Activation]:
    if isinstance(settings, WeightSettings):
        return assign_formats(model.config, settings), settings.activations
    if isinstance(settings, PlainSettings):
        spec = FORMATS.get(settings.dtype)
        matrices = {name: spec for name, shape in model.config.tensor_shapes().items() if len(shape) == 2}
        return matrices, settings.activations or "bf16"
    raise RecipeError(
        f"What '{technique}' leaves can not be imitated with random weights. Give a checkpoint with real weights."
    )
