"""Every tensor of a model in every format that it may get, quantized once, and what each costs and loses on its own.

Tensors come from uniform models, one a format, in which no matrix makes up for those before it: they are put together
with tensors of other formats, where that would be wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats import FORMATS
from trilemma.formats.pack import format_bytes
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Model
from trilemma.search.levels import LevelTable
from trilemma.search.texts import Texts
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.quantize.assignment import WeightSettings, assign_formats, assign_runs
from trilemma.techniques.schemes import QUANTIZERS
from trilemma.techniques.technique import Build

Progress = Callable[[int, int, str], None]
FLOOR = "int8-g32"  # what all other tensors have while one is judged: as good as lossless, and fast to run
# Scales of two levels where rows are long enough for them (a multiple of 256 values), else the nearest bits with one.
TWO_LEVELS = ("int2-g16-k", "int3-g16-k", "int4-g128-asym", "int4-g32-k", "int5-g32-k", "int6-g16-k", FLOOR)
ONE_LEVEL = ("int2-g32-asym", "int3-g32-asym", "int4-g128-asym", "int4-g32-asym", "int5-g32-asym", "int6-g32", FLOOR)
_ENDS = ("embedding.weight", "head.weight")


@dataclass(frozen=True)
class Kit:
    """Every tensor in every format that it can have, and the runs that go with it.

    names: of the tensors; levels: formats, one for each entry of `models`, which are uniform.
    """

    names: tuple[str, ...]
    levels: tuple[str, ...]
    models: tuple[Model, ...]

    @property
    def floor(self) -> Model:
        """What all other tensors are taken from while one is judged."""
        return self.models[self.levels.index(FLOOR)] if FLOOR in self.levels else self.models[-1]

    def has(self, item: int, level: int) -> bool:
        return self.models[level].format_of(self.names[item]) == self.levels[level]

    def assemble(self, chosen: Mapping[int, int]) -> Model:
        """The floor with some tensors (item -> level) in other formats."""
        tensors = {self.names[item]: self.models[level].stored(self.names[item]) for item, level in chosen.items()}
        formats = {self.names[item]: FORMATS.get(self.levels[level]) for item, level in chosen.items()}
        return self.floor.with_tensors(tensors, assign_runs(self.floor.config, formats, "int8-g32"))


def default_levels(config: DecoderConfig) -> tuple[str, ...]:
    """Formats from 2 to 8 bits that most of the model's matrices can have."""
    long = [shape[1] % 256 == 0 for shape in config.tensor_shapes().values() if len(shape) == 2]
    return TWO_LEVELS if all(long) else ONE_LEVEL


def make_kit(
    model: Model, texts: Texts, levels: Sequence[str], method: str, *, seed: int, threads: int | None,
    device: str = "cpu", progress: Progress,
) -> Kit:  # fmt: skip
    """A uniform model for each format.

    Raises:
        RecipeError: fewer than two formats, or one that is not known.
    """
    wanted = tuple(dict.fromkeys(levels))
    if len(wanted) < 2:
        raise RecipeError(f"Choosing bits needs two formats or more, not {', '.join(wanted) or 'none'}.")
    models = []
    kept: dict[str, Any] = {}  # gradients are those of the same model every time
    for number, level in enumerate(wanted):

        def step(done: int, total: int, _: str, number: int = number, level: str = level) -> None:
            progress(number * total + done, len(wanted) * total, f"all tensors as {level}")

        build = Build(texts.calibration, seed, threads, device, kept=kept, progress=step)
        recipe = recipe_of({}, method, level, seed, weights=level)
        if recipe.steps[0].technique == "gptaq":
            recipe = recipe.model_copy(update={"steps": (_apart(recipe.steps[0]),)})
        models.append(apply_recipe(model, recipe, build))
    return Kit(kit_names(model.config, wanted[0]), wanted, tuple(models))


def kit_names(config: DecoderConfig, level: str) -> tuple[str, ...]:
    """Tensors that get a format each: embedding, head, and all inside layers but routers."""
    sorts = assign_formats(config, WeightSettings.model_validate({"weights": level}))
    return tuple(name for name, spec in sorts.items() if not spec.floating or name in _ENDS)


def measure_table(
    kit: Kit,
    kl_of: Callable[[Model], float],
    seconds_of: Callable[[str, str], float] | None,
    tell: Progress,
) -> LevelTable:
    """KL, bytes (and seconds, by tensor and format) of each tensor alone in each format, all others as in the floor."""
    items, levels = len(kit.names), len(kit.levels)
    loss = np.zeros((items, levels))
    takes = np.full((items, levels, 1 if seconds_of is None else 2), np.inf)
    floor = kit.floor
    shapes = floor.config.tensor_shapes()
    least = kl_of(floor)
    for item, name in enumerate(kit.names):
        shape = (shapes[name][0], shapes[name][1])
        for level, format_name in enumerate(kit.levels):
            tell(item * levels + level, items * levels, "KL of each tensor in each format")
            if not kit.has(item, level):
                continue
            takes[item, level, 0] = format_bytes(format_name, shape)
            if seconds_of is not None:
                takes[item, level, 1] = seconds_of(name, format_name)
            if floor.format_of(name) != format_name:
                loss[item, level] = max(0.0, kl_of(kit.assemble({item: level})) - least)
    return LevelTable(loss, takes)


def recipe_of(formats: Mapping[str, str], method: str, name: str, seed: int, *, weights: str | None = None) -> Recipe:
    """A recipe that gives each tensor its format: the commonest as `weights`, the others by name."""
    inside = Counter(value for tensor, value in formats.items() if tensor.startswith("layers."))
    common = weights or inside.most_common(1)[0][0]
    settings = {
        "weights": common, "embedding": formats.get("embedding.weight", common), "activations": "int8-g32",
        "overrides": {tensor: value for tensor, value in formats.items()
                      if tensor.startswith("layers.") and value != common},
    }  # fmt: skip
    settings["head"] = formats.get("head.weight", settings["embedding"])
    technique, more = QUANTIZERS[method]
    return Recipe(name=name, seed=seed, steps=(Step(technique=technique, settings=settings | more),))


def _apart(step: Step) -> Step:
    """Matrices that do not make up for those before them."""
    return step.model_copy(update={"settings": step.settings | {"pull": 0.0, "drift": 0.0}})
