"""A model with the shapes and formats that a recipe would leave, and random weights: for cost alone.

Quantizing a billion random weights would take minutes and change nothing about what running them costs.
Steps that choose codes (rtn, gptq) are imitated by random codes in the same formats, steps that remove channels
or layers by the same share taken evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe
from trilemma.formats import FORMATS
from trilemma.formats.grid import Format
from trilemma.formats.random_weights import with_random_weights
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Activation, Model, RunSettings
from trilemma.techniques.apply import check_recipe
from trilemma.techniques.quantize.assignment import WeightSettings, assign_formats, assign_runs
from trilemma.techniques.quantize.kv_cache import KvCacheSettings
from trilemma.techniques.quantize.plain import PlainSettings
from trilemma.techniques.technique import Adding, Foreseeable, Remaking, TechniqueSettings


@dataclass(frozen=True)
class Foreseen:
    """What a recipe leaves, by arithmetic: shapes, and format and input precision of the matrices that it changes.

    exact: False when the shapes depend on what techniques find in the weights; they are then of about the same cost.
    """

    config: DecoderConfig
    formats: Mapping[str, str]
    activations: Mapping[str, Activation]
    kv_cache: str
    exact: bool


def foresee(model: Model, recipe: Recipe) -> Foreseen:
    """What the recipe will leave of a model. Builds nothing, reads no weight.

    Raises:
        RecipeError: wrong settings, or a step whose result is not known before it is done.
        UnsupportedModelError: a technique that can not work on this model.
    """
    config, exact = model.config, True
    formats: dict[str, str] = {}
    activations: dict[str, Activation] = {}
    kv: str = model.run.kv_cache
    for technique, settings in check_recipe(recipe, config):
        if isinstance(settings, KvCacheSettings):
            kv = settings.precision
        elif isinstance(technique, Foreseeable):
            before, config = config, technique.config_after(config, settings)
            if isinstance(technique, Remaking):
                for name in config.tensor_shapes().keys() - before.tensor_shapes().keys():
                    old = technique.origin(name)
                    formats[name] = "f32" if old is None else formats.get(old) or model.format_of(old)
                    activations[name] = "f32" if old is None else activations.get(old, model.linear(old).activation)
            if isinstance(technique, Adding):
                inputs = {name: activations.get(name, model.linear(name).activation) for name in before.linear_names()}
                added = technique.added(settings, inputs)
                formats |= {name: added[name][0] for name in added}
                activations |= {name: added[name][1] for name in added}
            exact = exact and technique.exact(settings)
        else:
            chosen, inputs = _formats(config, technique.name, settings)
            formats |= {name: spec.name for name, spec in chosen.items()}
            activations |= {name: run.activation for name, run in assign_runs(config, chosen, inputs).items()}
    return Foreseen(config, formats, activations, kv, exact)


def cost_twin(model: Model, recipe: Recipe, seed: int = 0) -> Model:
    """Random weights in the shapes and formats of `recipe`: costs what the real result would, says nothing of quality.

    Raises:
        RecipeError: wrong settings, or a step whose result can not be imitated.
        UnsupportedModelError: a technique that can not work on this model.
    """
    seen = foresee(model, recipe)
    if seen.kv_cache != model.run.kv_cache:
        model = model.with_run(RunSettings.model_validate({**model.run.model_dump(), "kv_cache": seen.kv_cache}))
    if not seen.formats and seen.config == model.config:
        return model
    return with_random_weights(
        model.with_config(seen.config),
        lambda name: seen.formats.get(name) or model.format_of(name),
        activation_of=lambda name: seen.activations.get(name, model.linear(name).activation),
        seed=seed,
    )


def recipe_runs(model: Model, recipe: Recipe) -> tuple[dict[str, str], dict[str, Activation], str]:
    """Of a recipe that keeps all shapes: formats and input precisions of what it changes, and the KV cache.

    Raises:
        RecipeError: as `foresee`, or the recipe changes shapes.
        UnsupportedModelError: a technique that can not work on this model.
    """
    seen = foresee(model, recipe)
    if seen.config != model.config:
        raise RecipeError(
            f"'{recipe.name}' changes the shapes of the model. Build it first, then look at the artifact."
        )
    return dict(seen.formats), dict(seen.activations), seen.kv_cache


def _formats(
    config: DecoderConfig, technique: str, settings: TechniqueSettings
) -> tuple[dict[str, Format], Activation]:
    if isinstance(settings, WeightSettings):
        return assign_formats(config, settings), settings.activations
    if isinstance(settings, PlainSettings):
        spec = FORMATS.get(settings.dtype)
        matrices = {name: spec for name, shape in config.tensor_shapes().items() if len(shape) == 2}
        return matrices, settings.activations or "bf16"
    raise RecipeError(
        f"What '{technique}' leaves can not be imitated with random weights. Give a checkpoint with real weights."
    )
