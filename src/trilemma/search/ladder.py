"""The precision ladder: one model in every precision side by side, where low precision breaks, what repairs it.

Repairs are built on calibrate text; quality is measured on the other two parts of the user's texts.
Speeds of all rungs come from one interleaved run. Left out: a search for the best rung (`run.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from trilemma.core.environment import read_environment, total_memory_bytes
from trilemma.core.errors import EngineError, InputError, RecipeError
from trilemma.core.ladder import Ladder, Rung
from trilemma.core.measurement import Measurement
from trilemma.data.documents import Prepare
from trilemma.data.windows import TokenSet
from trilemma.formats.artifact import load_any
from trilemma.measure.bench import MEMORY_SHARE, decode_bytes
from trilemma.measure.device.ceilings import read_bandwidth
from trilemma.measure.device.compute_ceiling import compute_rate
from trilemma.measure.energy.build_cost import BuildMeter
from trilemma.measure.memory.held import engine_memory
from trilemma.measure.quality.evaluate import build_reference
from trilemma.measure.quality.figures import Reference, evaluate
from trilemma.measure.timing.speed import RelativeTimes, SpeedRun, relative_times
from trilemma.model.checkpoint import model_hash
from trilemma.model.cost import prompt_macs
from trilemma.model.model import Activation, Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import open_engine
from trilemma.runtime.engine import Engine, EngineOptions
from trilemma.search.ladder_findings import findings
from trilemma.search.plan import plan_lengths
from trilemma.search.predict import predict_bytes
from trilemma.search.texts import Texts, read_texts
from trilemma.search.workbench import Lengths
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.ranges import activation_ranges
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.technique import Build

Step = Callable[[int, int, str], None]

PRECISIONS: dict[str, str] = {
    "f32": "32-bit weights and arithmetic: the reference",
    "f16": "16-bit weights, f32 arithmetic",
    "bf16": "16-bit weights and activations with the range of f32",
    "W8A16": "8-bit weights, 16-bit activations",
    "W8A8": "8-bit weights and activations, a scale per row",
    "W8A8-g32": "8-bit weights and activations in groups of 32",
    "W4A16-g32": "4-bit weights, 16-bit activations",
    "W4A8-g32": "4-bit weights, 8-bit activations",
}
ARITHMETIC: dict[str, tuple[str, str]] = {  # rung -> (runtime, what); quality only, nothing runs fast this way
    "f16 arithmetic": ("torch-f16", "everything in f16, its largest number 65,504"),
    "bf16 arithmetic": ("torch-bf16", "everything in bf16"),
}
REPAIRS: dict[str, tuple[str, str]] = {  # scheme -> (the rung it repairs, what)
    "smooth+W8A8-g32": ("W8A8-g32", "outliers moved into the weights (SmoothQuant)"),
    "W4A8-g32-gptq": ("W4A8-g32", "codes chosen again on calibration text (GPTQ)"),
    "smooth+W4A8-g32-gptq": ("W4A8-g32", "both"),
    "W4A8-g32-gptq+tune40": ("W4A8-g32", "GPTQ, then 40 steps that train norms alone"),
}
_F16_TOKENS = 3_000  # torch computes f16 slowly on a CPU
_COPIES = 2  # of a rung's weights: as built, and in its engine
_WINDOWS = 48  # of calibration text: enough to show what a repair does


def measure_ladder(
    model: Model | str | Path,
    data: Sequence[str | Path],
    *,
    context: int | None = None,
    max_tokens: int = 12_000,
    prepare: Prepare = "none",
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
    repetitions: int = 5,
    seed: int = 0,
    threads: int | None = None,
    repairs: Sequence[str] | None = None,
    progress: Step | None = None,
) -> Ladder:
    """Every precision and repair of one model, with costs, shares of the ceilings, quality and findings.

    Args:
        data: text files; repairs see one part of their documents, quality is measured on the rest.
        max_tokens: of the quality text.
        repairs: schemes of `REPAIRS` to build; all by default.

    Raises:
        InputError: random weights, lengths that do not fit. DataError: texts that can not be used.
    """
    loaded = model if isinstance(model, Model) else load_any(model)
    if getattr(loaded.source, "random", False) or loaded.path is None:
        raise InputError("The ladder needs real weights and a tokenizer. Give a checkpoint folder.")
    lengths = plan_lengths(loaded.config, context)
    update = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "repetitions": repetitions}
    lengths = lengths.model_copy(update={key: value for key, value in update.items() if value is not None})
    texts = read_texts(list(data), Tokenizer.load(loaded.path), lengths.context, seed, prepare)
    tell = progress or (lambda done, total, what: None)
    chosen = list(REPAIRS) if repairs is None else list(repairs)
    schemes = [*PRECISIONS, *chosen]
    _require_memory(loaded, schemes, lengths.context)
    built, rungs = _build(loaded, texts, schemes, seed, threads, tell)
    ranges = activation_ranges(loaded, texts.calibration)
    with tempfile.TemporaryDirectory(prefix="trilemma-ladder-") as place:
        folder = Path(place)
        reference = _reference(loaded, texts, max_tokens, threads, folder / "all", tell)
        short = _reference(loaded, texts, min(_F16_TOKENS, max_tokens), threads, folder / "short", tell)
        rungs, engine = _measure(built, rungs, lengths, reference, threads, tell)
        rungs += [_arithmetic(loaded, name, lengths, short, threads, tell) for name in ARITHMETIC]
        notes = tuple(reference.notes)
    ladder = Ladder(
        model=str(model.path if isinstance(model, Model) else model), rungs=tuple(rungs), notes=notes,
        environment=read_environment(isa=engine.isa, threads=engine.threads, seed=seed),
        context=lengths.context, prompt_tokens=lengths.prompt_tokens, output_tokens=lengths.output_tokens,
        largest_activation=ranges.largest, largest_at=ranges.largest_at,
        outlier_ratio=ranges.outlier_ratio, outlier_at=ranges.outlier_at,
    )  # fmt: skip
    return ladder.model_copy(update={"findings": findings(ladder)})


def _require_memory(model: Model, schemes: Sequence[str], context: int) -> None:
    """Raises InputError when all rungs, open side by side, would not fit: said before any work."""
    sizes = [predict_bytes(model, scheme_to_recipe(scheme), context).weights_bytes for scheme in schemes]
    needed, there = _COPIES * sum(sizes), total_memory_bytes()
    if there and needed > MEMORY_SHARE * there:
        raise InputError(
            f"All {len(sizes)} rungs side by side need about {needed / 1e9:.1f} GB; this machine has "
            f"{there / 1e9:.1f} GB. "
            "Compare a few at a time: `trilemma compress` each, then `trilemma compare`."
        )


def _build(
    model: Model, texts: Texts, schemes: Sequence[str], seed: int, threads: int | None, tell: Step
) -> tuple[dict[str, Model], list[Rung]]:
    """Every scheme's model, and its rung with what building took. What does not fit is a failed rung."""
    built: dict[str, Model] = {}
    rungs: list[Rung] = []
    calibration = texts.calibration[:_WINDOWS]
    for index, scheme in enumerate(schemes):
        repaired, what = REPAIRS.get(scheme, (None, PRECISIONS.get(scheme, "")))
        rung = Rung(name=scheme, what=what, repairs=repaired)
        tell(index, len(schemes), f"building {scheme}")
        done, _, rest = scheme.rpartition("+")
        begin, rest = (built[done], rest) if done in built else (model, scheme)
        try:
            build = Build(
                calibration=calibration, seed=seed, threads=threads, original=model,
                progress=_named(scheme, tell),
            )  # fmt: skip
            with BuildMeter() as meter:
                built[scheme] = apply_recipe(begin, scheme_to_recipe(rest, seed=seed), build)
        except RecipeError as error:
            if scheme == "f32":
                raise
            rungs.append(rung.model_copy(update={"failed": str(error)}))
            continue
        spent = meter.results()
        if begin is not model:
            before = next(rung.measurements for rung in rungs if rung.name == done)
            spent = {name: _sum(before[name], found) for name, found in spent.items()}
        rungs.append(rung.model_copy(update={"measurements": spent}))
    return built, rungs


def _named(scheme: str, tell: Step) -> Step:
    return lambda done, total, what: tell(done, total, f"{scheme}: {what}")


def _sum(one: Measurement, other: Measurement) -> Measurement:
    """Of two builds, one after the other; unavailable when either is."""
    if one.value is None or other.value is None:
        return one if one.value is None else other
    ci95 = None
    if one.ci95 is not None and other.ci95 is not None:
        ci95 = (one.ci95[0] + other.ci95[0], one.ci95[1] + other.ci95[1])
    return other.model_copy(update={"value": one.value + other.value, "ci95": ci95})


def _reference(model: Model, texts: Texts, tokens: int, threads: int | None, folder: Path, tell: Step) -> Reference:
    half = tokens // 2
    token_set = TokenSet.joined([texts.token_set("select", half), texts.token_set("confirm", tokens - half)])
    options = EngineOptions(threads=threads)
    return build_reference(model, token_set, folder, options=options, key=model_hash(model), progress=tell)


def _measure(
    built: dict[str, Model],
    rungs: list[Rung],
    lengths: Lengths,
    reference: Reference,
    threads: int | None,
    tell: Step,
) -> tuple[list[Rung], Engine]:
    room = max(lengths.context, lengths.prompt_tokens + lengths.output_tokens)
    options = EngineOptions(threads=threads, max_context=room)
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name, model in built.items():
            engines[name] = open_engine(model, options=options)
            stack.callback(engines[name].close)
        first = next(iter(engines.values()))
        times, relative = _times(engines, lengths, tell)
        ceilings = _Ceilings(first.threads)
        measured: list[Rung] = []
        for rung in rungs:
            if rung.failed:
                measured.append(rung)
                continue
            engine = engines[rung.name]
            found = {**rung.measurements, **engine_memory(engine), **times[rung.name]}
            found |= evaluate(engine, reference, progress=tell)
            update = {"measurements": found, "relative": relative[rung.name]}
            measured.append(rung.model_copy(update=update | _rates(built[rung.name], engine, found, lengths, ceilings)))
        return measured, first


def _times(
    engines: dict[str, Engine], lengths: Lengths, tell: Step
) -> tuple[dict[str, dict[str, Measurement]], dict[str, RelativeTimes]]:
    run = SpeedRun(engines, prompt_tokens=lengths.prompt_tokens, output_tokens=lengths.output_tokens)
    try:
        run.warm_up()
        for turn in range(lengths.repetitions):
            run.repeat()
            tell(turn + 1, lengths.repetitions, "speed, all rungs side by side")
        found = run.results()
    finally:
        run.close()
    base = found[next(iter(engines))]
    return found, {name: relative_times(base, mine) for name, mine in found.items()}


class _Ceilings:
    """What this machine was seen to read and to multiply, each probed once a run."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._compute: dict[tuple[str, Activation], float] = {}
        self._read: dict[int, float] = {}

    def macs_per_s(self, format_name: str, activation: Activation) -> float:
        key = (format_name, activation)
        if key not in self._compute:
            self._compute[key] = compute_rate(format_name, activation, self._threads).macs_per_s
        return self._compute[key]

    def bytes_per_s(self, working_set: int) -> float:
        if working_set not in self._read:
            self._read[working_set] = read_bandwidth(self._threads, working_set).bytes_per_s
        return self._read[working_set]


def _rates(
    model: Model, engine: Engine, found: dict[str, Measurement], lengths: Lengths, ceilings: _Ceilings
) -> dict[str, float]:
    """Achieved multiply-accumulates and bytes a second, and their shares of this machine's ceilings."""
    read = decode_bytes(model, engine.kv_cache, lengths.prompt_tokens + lengths.output_tokens // 2)
    inner = model.config.linear_names()[-1]
    most = ceilings.macs_per_s(model.format_of(inner), model.linear(inner).activation)
    achieved = prompt_macs(model.config, lengths.prompt_tokens) / _value(found, "ttft_s")
    moved = read / _value(found, "tpot_s")
    return {
        "prefill_macs_per_s": achieved, "compute_share": achieved / most,
        "decode_bytes_per_s": moved, "bandwidth_share": moved / ceilings.bytes_per_s(read),
    }  # fmt: skip


def _value(found: dict[str, Measurement], metric: str) -> float:
    value = found[metric].value
    assert value is not None
    return value


def _arithmetic(
    model: Model, name: str, lengths: Lengths, reference: Reference, threads: int | None, tell: Step
) -> Rung:
    """Quality alone of the checkpoint's own weights with every operation in 16 bits."""
    runtime, what = ARITHMETIC[name]
    options = EngineOptions(threads=threads, max_context=lengths.context, kv_cache="f32")
    engine = open_engine(model, runtime=runtime, options=options)
    rung = Rung(name=name, what=what, runtime=runtime)
    try:
        return rung.model_copy(update={"measurements": evaluate(engine, reference, progress=tell)})
    except EngineError as error:
        return rung.model_copy(update={"failed": str(error)})
    finally:
        engine.close()
