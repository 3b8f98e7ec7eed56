"""Bits for each tensor, embedding and head included, so that the whole loses least within its bytes.

    every tensor in every format -> the KL of the model in which it alone has that format -> the exact choice under the
    limits (`levels.py`) -> evolution by the true KL of whole models -> a recipe with a format for each tensor

Candidates are put together from matrices that were quantized once for each format, in uniform models, so that one costs
no more than its measurement. There no matrix makes up for the others', which would be those of another candidate. The
recipe quantizes anew, each matrix on what those before it produce.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trilemma.core.errors import DataError, RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.core.record import Record
from trilemma.data.documents import Prepare
from trilemma.formats import FORMATS
from trilemma.formats.pack import format_bytes
from trilemma.model.checkpoint import model_hash
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.search.levels import Levels, LevelTable, choose, evolve
from trilemma.search.plan import plan_lengths
from trilemma.search.product_seconds import time_products
from trilemma.search.searchable import load_searchable
from trilemma.search.texts import Texts, read_texts
from trilemma.search.workbench import Lengths, Workbench
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.quantize.assignment import WeightSettings, assign_formats, assign_runs
from trilemma.techniques.schemes import QUANTIZERS
from trilemma.techniques.technique import Build

Progress = Callable[[int, int, str], None]
FLOOR = "int8-g32"  # what all other tensors have while one is judged: as good as lossless, and fast to run
# Scales of two levels where rows are long enough for them (a multiple of 256 values), else the nearest bits with one.
TWO_LEVELS = ("int2-g16-k", "int3-g16-k", "int4-g128-asym", "int4-g32-k", "int5-g32-k", "int6-g16-k", FLOOR)
ONE_LEVEL = ("int2-g32-asym", "int3-g32-asym", "int4-g128-asym", "int4-g32-asym", "int5-g32-asym", "int6-g32", FLOOR)
METHOD = "guided"
GENERATIONS, OFFSPRING = 20, 8
TABLE_TOKENS = 8192
_ENDS = ("embedding.weight", "head.weight")


class MixedBits(Record):
    """What was found.

    recipe: with a format for each tensor; bits: a matrix value takes in it, scales included; kl_mean: nats a token of
    the model put together, on text that calibrated nothing; added_kl: of the exact choice before evolution, as a sum
    over tensors; exact_kl_mean: what that choice really lost; formats: tensor -> format; tpot_s: a token on this host,
    by the times of its products, where that was limited.
    """

    recipe: Recipe
    bits: float
    kl_mean: float
    exact_kl_mean: float
    added_kl: float
    formats: dict[str, str]
    tpot_s: float | None = None

    def __str__(self) -> str:
        counts = ", ".join(f"{count} x {name}" for name, count in sorted(Counter(self.formats.values()).items()))
        speed = "" if self.tpot_s is None else f", {1e3 * self.tpot_s:.3g} ms a token by its products' times"
        return f"{self.bits:.2f} bits a value ({counts}), KL {self.kl_mean:.2e} nats a token on text held back{speed}"


@dataclass(frozen=True)
class Kit:
    """Every tensor in every format that it can have, and the runs that go with it.

    names: of the tensors; levels: formats, one for each entry of `models`, which are uniform.
    """

    names: tuple[str, ...]
    levels: tuple[str, ...]
    models: tuple[Model, ...]

    def has(self, item: int, level: int) -> bool:
        return self.models[level].format_of(self.names[item]) == self.levels[level]

    def assemble(self, base: Model, chosen: Mapping[int, int]) -> Model:
        """`base` with some tensors (item -> level) in other formats."""
        tensors = {self.names[item]: self.models[level].stored(self.names[item]) for item, level in chosen.items()}
        formats = {self.names[item]: FORMATS.get(self.levels[level]) for item, level in chosen.items()}
        return base.with_tensors(tensors, assign_runs(base.config, formats, "int8-g32"))


def mix_bits_for(
    model: Model | str | Path,
    output: str | Path,
    bits: float,
    data: Sequence[str | Path],
    *,
    formats: Sequence[str] = (),
    method: str = METHOD,
    tpot_s: float | None = None,
    prepare: Prepare = "none",
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> MixedBits:
    """`mix_bits` of a model in a folder, on texts; what it caches lies in `<output>.work` while it works.

    Raises:
        InputError: a model without weights or tokenizer, or a number of bits that is none.
        DataError: texts that can not be used.
        RecipeError: as `mix_bits`.
    """
    if not 0 < bits <= 32:
        raise RecipeError(f"A matrix value can not take {bits:g} bits. Give a number such as 4.5.")
    if not data:
        raise DataError(
            "Bits are shared out by what they lose on text like that of your task. Give it with --data FILE."
        )
    known = [FORMATS.get(name).name for name in formats]
    loaded = load_searchable(model)
    assert loaded.path is not None
    lengths = plan_lengths(loaded.config, None)
    texts = read_texts(data, Tokenizer.load(loaded.path), lengths.context, seed, prepare)
    folder = Path(output).with_name(Path(output).name + ".work")
    try:
        return mix_bits(
            loaded, texts, bits, folder=folder, key=model_hash(loaded), levels=known or default_levels(loaded.config),
            method=method, tpot_s=tpot_s, seed=seed, threads=threads, progress=progress,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def mix_bits(
    model: Model,
    texts: Texts,
    bits: float,
    *,
    folder: Path,
    key: str,
    levels: Sequence[str],
    method: str = METHOD,
    generations: int = GENERATIONS,
    tokens: int = TABLE_TOKENS,
    tpot_s: float | None = None,
    runtime: str = "native",
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> MixedBits:
    """The recipe of least KL in which matrix values take at most `bits` each, scales and padding included.

    Args:
        folder: for the reference's log-probabilities; key: identity of `model`, under which they are found again.
        levels: names of formats to choose from.
        method: how codes are chosen, as schemes say it: rtn, gptq, gptaq, guided, ...
        generations: of the evolution; 0 stops at the exact choice.
        tokens: of select text on which KL is measured.
        tpot_s: what a token may take here besides, by measured seconds of each product (`product_seconds.py`).

    Raises:
        RecipeError: fewer than two formats, an unknown method, or no choice that fits.
    """
    if method not in QUANTIZERS:
        raise RecipeError(f"No method is called '{method}'. Methods: {', '.join(QUANTIZERS)}.")
    shapes = [shape for shape in model.config.tensor_shapes().values() if len(shape) == 2]
    least = sum(min(format_bytes(level, (shape[0], shape[1])) for level in levels) for shape in shapes)
    if least > bits * sum(shape[0] * shape[1] for shape in shapes) / 8:  # by arithmetic, before any work
        smallest = 8 * least / sum(shape[0] * shape[1] for shape in shapes)
        raise RecipeError(
            f"No choice fits {bits:g} bits a value: the smallest formats take {smallest:.2f}. "
            "Allow more, or give smaller formats."
        )
    tell = progress or (lambda *_: None)
    seconds = None
    if tpot_s is not None:
        names, highest = kit_names(model.config, levels[0]), FLOOR if FLOOR in levels else levels[-1]
        nbytes = bits * sum(shape[0] * shape[1] for shape in shapes) / 8
        seconds = time_products(model, names, levels, highest, nbytes, threads=threads, tell=tell)
        seconds.limit(tpot_s, names)  # refuses what nothing reaches, before any work
    lengths = Lengths(context=texts.context, prompt_tokens=8, output_tokens=2, repetitions=1)
    bench = Workbench(model, lengths, folder, key, runtime, threads)
    with bench:
        bench.refer("select", texts.token_set("select", tokens))

        def kl_of(candidate: Model) -> float:
            engine = bench.open(candidate)
            try:
                return bench.quality(engine, "select")["kl_mean"].value or 0.0
            finally:
                engine.close()

        kit = make_kit(model, texts, levels, method, seed=seed, threads=threads, progress=tell)
        floor = kit.models[kit.levels.index(FLOOR)] if FLOOR in kit.levels else kit.models[-1]
        tensors = model.config.tensor_shapes()
        values = sum(tensors[name][0] * tensors[name][1] for name in kit.names)
        limits = [bits * values / 8]
        if tpot_s is not None and seconds is not None:
            limits.append(seconds.limit(tpot_s, kit.names))
        table = measure_table(kit, floor, kl_of, None if seconds is None else seconds.of, tell)
        exact = choose(table, limits)
        if exact is None:
            raise RecipeError(_nothing_fits(table, bits, values, limits))
        known: list[float] = []

        def loss_of(chosen: Levels) -> float:
            tell(len(known), generations * OFFSPRING + 1, "KL of whole models")
            known.append(kl_of(kit.assemble(floor, dict(enumerate(chosen)))))
            return known[-1]

        best, loss = evolve(table, exact, limits, loss_of, generations=generations, offspring=OFFSPRING, seed=seed)
    total = table.total(best)
    formats = {name: kit.levels[level] for name, level in zip(kit.names, best, strict=True)}
    recipe = recipe_of(formats, method, f"mix{8 * total[0] / values:.2f}-{method}", seed)
    return MixedBits(
        recipe=recipe.model_copy(update={"calibration": texts.calibration_record}),
        bits=float(8 * total[0] / values), kl_mean=loss, exact_kl_mean=known[0], added_kl=table.sum_of_losses(exact),
        formats=formats, tpot_s=None if tpot_s is None else tpot_s - limits[1] + float(total[1]),
    )  # fmt: skip


def default_levels(config: DecoderConfig) -> tuple[str, ...]:
    """Formats from 2 to 8 bits that most of the model's matrices can have."""
    long = [shape[1] % 256 == 0 for shape in config.tensor_shapes().values() if len(shape) == 2]
    return TWO_LEVELS if all(long) else ONE_LEVEL


def make_kit(
    model: Model, texts: Texts, levels: Sequence[str], method: str, *, seed: int, threads: int | None,
    progress: Progress,
) -> Kit:  # fmt: skip
    """A uniform model for each format.

    Raises:
        RecipeError: fewer than two formats, or one that is not known.
    """
    wanted = tuple(dict.fromkeys(levels))
    if len(wanted) < 2:
        raise RecipeError(f"Choosing bits needs two formats or more, not {', '.join(wanted) or 'none'}.")
    models = []
    for number, level in enumerate(wanted):

        def step(done: int, total: int, _: str, number: int = number, level: str = level) -> None:
            progress(number * total + done, len(wanted) * total, f"all tensors as {level}")

        build = Build(texts.calibration, seed, threads, progress=step)
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
    floor: Model,
    kl_of: Callable[[Model], float],
    seconds_of: Callable[[str, str], float] | None,
    tell: Progress,
) -> LevelTable:
    """KL, bytes (and seconds, of a tensor's name and format) of each tensor alone in each, all others as in `floor`."""
    items, levels = len(kit.names), len(kit.levels)
    loss = np.zeros((items, levels))
    takes = np.full((items, levels, 1 if seconds_of is None else 2), np.inf)
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
                loss[item, level] = max(0.0, kl_of(kit.assemble(floor, {item: level})) - least)
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


def _nothing_fits(table: LevelTable, bits: float, values: int, limits: Sequence[float]) -> str:
    least = table.takes.min(axis=1).sum(axis=0)
    text = f"No choice fits {bits:g} bits a value: the smallest formats take {8 * least[0] / values:.2f}"
    if len(limits) > 1:
        text += f", the fastest {1e3 * least[1]:.3g} ms of {1e3 * limits[1]:.3g}"
    return text + ". Allow more, or give smaller formats."
