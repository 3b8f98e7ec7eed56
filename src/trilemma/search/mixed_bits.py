"""Bits for each tensor, embedding and head included, so that the whole loses least within its bytes.

    every tensor in every format -> the KL of the model in which it alone has that format -> the exact choice under the
    limits (`levels.py`) -> evolution by the true KL of whole models -> a recipe with a format for each tensor

Candidates are put together from matrices that were quantized once for each format (`tensor_kit.py`), so that one costs
no more than its measurement. The recipe quantizes anew, each matrix on what those before it produce.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
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
from trilemma.search.product_seconds import ProductSeconds, time_products
from trilemma.search.searchable import load_searchable
from trilemma.search.tensor_kit import (
    FLOOR,
    Progress,
    default_levels,
    kit_names,
    make_kit,
    measure_table,
    recipe_of,
)
from trilemma.search.texts import Texts, read_texts
from trilemma.search.workbench import Lengths, Workbench
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.schemes import QUANTIZERS
from trilemma.techniques.technique import Build
from trilemma.techniques.torch_device import check_device

METHOD = "guided"
GENERATIONS, OFFSPRING = 20, 8
_TUNING = ("tune-scales", "tune-norms")
TABLE_TOKENS = 8192


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


def mix_bits_for(
    model: Model | str | Path,
    output: str | Path,
    bits: float,
    data: Sequence[str | Path],
    *,
    formats: Sequence[str] = (),
    method: str = METHOD,
    tpot_s: float | None = None,
    around: Sequence[Step] = (),
    prepare: Prepare = "none",
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> MixedBits:
    """`mix_bits` of a model in a folder, on texts; what it caches lies in `<output>.work` while it works.

    Raises:
        InputError: a model without weights or tokenizer, a number of bits that is none, or no such device here.
        DataError: texts that can not be used.
        RecipeError: as `mix_bits`.
    """
    check_device(device)
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
            method=method, tpot_s=tpot_s, around=around, seed=seed, threads=threads, device=device, progress=progress,
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
    around: Sequence[Step] = (),
    runtime: str = "native",
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
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
        device: that matrices are quantized on, see `techniques.torch_device`; KL is always measured on this host's CPU.
        around: steps that prepare the model (`smooth`), and those that tune what was quantized (`tune-scales`).

    Raises:
        RecipeError: fewer than two formats, an unknown method, a second quantizer, or no choice that fits.
        LimitError: a token that takes longer than that without any product.
    """
    if method not in QUANTIZERS:
        raise RecipeError(f"No method is called '{method}'. Methods: {', '.join(QUANTIZERS)}.")
    _check_bits(model.config, levels, bits)
    seconds = None
    if tpot_s is not None:
        seconds = time_levels(model, levels, bits, threads=threads, progress=progress)
        seconds.limit(tpot_s, kit_names(model.config, levels[0]))  # refuses what nothing reaches, before any work
    measured = Measured(
        model, texts, folder=folder, key=key, levels=levels, method=method, around=around, tokens=tokens,
        seconds=seconds, runtime=runtime, seed=seed, threads=threads, device=device, progress=progress,
    )  # fmt: skip
    return measured.choose(bits, tpot_s, generations=generations)


def time_levels(
    model: Model, levels: Sequence[str], bits: float, *, threads: int | None = None, progress: Progress | None = None
) -> ProductSeconds:
    """Seconds of every product in every format, as of a model of about so many bits."""
    names = kit_names(model.config, levels[0])
    nbytes = bits * sum(rows * columns for rows, columns in _shapes(model.config)) / 8
    floor = FLOOR if FLOOR in levels else levels[-1]
    return time_products(model, names, levels, floor, nbytes, threads=threads, tell=progress)


class Measured:
    """Every tensor in every format, measured once, to choose from under any number of limits.

    kit, table: what was measured, as arguments of `mix_bits` ask for it.
    """

    def __init__(
        self, model: Model, texts: Texts, *, folder: Path, key: str, levels: Sequence[str], method: str = METHOD,
        around: Sequence[Step] = (), tokens: int = TABLE_TOKENS, seconds: ProductSeconds | None = None,
        runtime: str = "native", seed: int = 0, threads: int | None = None, device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.texts, self.seconds = texts, seconds
        self._method, self._seed = method, seed
        self._tell = progress or (lambda *_: None)
        lengths = Lengths(context=texts.context, prompt_tokens=8, output_tokens=2, repetitions=1)
        self._bench = Workbench(model, lengths, folder, key, runtime, threads)
        self._bench.refer("select", texts.token_set("select", tokens))
        self._before, self._after = split_around(around)
        if self._before:
            build = Build(texts.calibration, seed, threads, device, progress=self._tell)
            model = apply_recipe(model, Recipe(name="prepared", seed=seed, steps=self._before), build)
        self.kit = make_kit(
            model, texts, levels, method, seed=seed, threads=threads, device=device, progress=self._tell
        )  # fmt: skip
        self.table = measure_table(self.kit, self._kl_of, None if seconds is None else seconds.of, self._tell)

    def choose(self, bits: float, tpot_s: float | None = None, *, generations: int = GENERATIONS) -> MixedBits:
        """The choice of least KL within so many bits a value and, where `seconds` were given, so long a token.

        Raises:
            RecipeError: no choice fits. LimitError: as `ProductSeconds.limit`.
        """
        kit, table = self.kit, self.table
        tensors = kit.floor.config.tensor_shapes()
        values = sum(tensors[name][0] * tensors[name][1] for name in kit.names)
        limits = [bits * values / 8]
        if self.seconds is not None:
            limits.append(np.inf if tpot_s is None else self.seconds.limit(tpot_s, kit.names))
        exact = choose(table, limits)
        if exact is None:
            raise RecipeError(_nothing_fits(table, bits, values, limits))
        known: list[float] = []

        def loss_of(chosen: Levels) -> float:
            self._tell(len(known), generations * OFFSPRING + 1, "KL of whole models")
            known.append(self._kl_of(kit.assemble(dict(enumerate(chosen)))))
            return known[-1]

        best, loss = evolve(
            table, exact, limits, loss_of, generations=generations, offspring=OFFSPRING, seed=self._seed
        )  # fmt: skip
        total = table.total(best)
        formats = {name: kit.levels[level] for name, level in zip(kit.names, best, strict=True)}
        name = f"mix{8 * total[0] / values:.2f}-{self._method}"
        recipe = recipe_of(formats, self._method, name, self._seed)
        return MixedBits(
            recipe=recipe.model_copy(
                update={
                    "calibration": self.texts.calibration_record,
                    "steps": (*self._before, *recipe.steps, *self._after),
                }
            ),
            bits=float(8 * total[0] / values), kl_mean=loss, exact_kl_mean=known[0],
            added_kl=table.sum_of_losses(exact), formats=formats,
            tpot_s=None if self.seconds is None else self.seconds.beside(kit.names) + float(total[1]),
        )  # fmt: skip

    def _kl_of(self, candidate: Model) -> float:
        engine = self._bench.open(candidate)
        try:
            return self._bench.quality(engine, "select")["kl_mean"].value or 0.0
        finally:
            engine.close()


def split_around(steps: Sequence[Step]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """(steps before the quantizer, steps after it): those from the first that tunes. Raises RecipeError."""
    if quantizers := [step.technique for step in steps if step.technique in {name for name, _ in QUANTIZERS.values()}]:
        raise RecipeError(
            f"Sharing out bits quantizes by itself; '{quantizers[0]}' beside it would do so twice. Give only what "
            "prepares the model or tunes it: smooth, smooth+scales100."
        )
    first = next((at for at, step in enumerate(steps) if step.technique in _TUNING), len(steps))
    return tuple(steps[:first]), tuple(steps[first:])


def _shapes(config: DecoderConfig) -> list[tuple[int, int]]:
    return [(shape[0], shape[1]) for shape in config.tensor_shapes().values() if len(shape) == 2]


def _check_bits(config: DecoderConfig, levels: Sequence[str], bits: float) -> None:
    """Refuses bits that nothing fits, by arithmetic and before any work. Raises RecipeError."""
    shapes = _shapes(config)
    least = 8 * sum(min(format_bytes(level, shape) for level in levels) for shape in shapes)
    values = sum(rows * columns for rows, columns in shapes)
    if least > bits * values:
        raise RecipeError(
            f"No choice fits {bits:g} bits a value: the smallest formats take {least / values:.2f}. "
            "Allow more, or give smaller formats."
        )


def _nothing_fits(table: LevelTable, bits: float, values: int, limits: Sequence[float]) -> str:
    least = table.takes.min(axis=1).sum(axis=0)
    text = f"No choice fits {bits:g} bits a value: the smallest formats take {8 * least[0] / values:.2f}"
    if len(limits) > 1:
        text += f", the fastest {1e3 * least[1]:.3g} ms of {1e3 * limits[1]:.3g}"
    return text + ". Allow more, or give smaller formats."
