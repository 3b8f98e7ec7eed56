"""What models cost on this machine: memory by the engine's own count, time interleaved, shares of the ceilings.

Models, schemes, cache policies, numbers of threads, runtimes and lengths are crossed; everything that fits in
memory together is interleaved, otherwise in groups, with a note. Quality has no place here: shapes with random
weights are welcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from trilemma.core.environment import command_line, read_environment, total_memory_bytes
from trilemma.core.errors import InputError
from trilemma.core.measurement import Measurement
from trilemma.core.recipe import Recipe
from trilemma.core.results import BenchReport, BenchRow
from trilemma.core.trial import Trial
from trilemma.formats.artifact import load_any, short_name, weights_bytes
from trilemma.measure.memory.held import engine_memory, memory_measurements, peak_memory
from trilemma.measure.stats import Interval
from trilemma.measure.timing.roofline import Ceilings, decode_bytes, with_shares
from trilemma.measure.timing.settle import Progress, repeat_for, repeat_until_settled
from trilemma.measure.timing.speed import SpeedRun
from trilemma.model.cost import parameter_count
from trilemma.model.model import Model
from trilemma.runtime import open_engine
from trilemma.runtime.batch import batch_engine
from trilemma.runtime.engine import Engine, EngineOptions

MEMORY_SHARE = 0.6  # of the machine's memory that the candidates of one group may fill
NATIVE = "native"


@dataclass(frozen=True)
class BenchCandidate:
    """One model in one form on one runtime. `path` lets its peak memory be measured in a fresh process."""

    name: str
    form: str
    model: Model
    options: EngineOptions = field(default_factory=EngineOptions)
    recipe: Recipe = field(default_factory=Recipe)
    path: Path | None = None
    runtime: str = NATIVE


class Lengths(NamedTuple):
    """Tokens of a timed request."""

    prompt: int
    output: int

    @property
    def context(self) -> int:
        return self.prompt + self.output


def bench(
    models: str | Path | BenchCandidate | Iterable[str | Path | BenchCandidate],
    *,
    runtime: str | Sequence[str] = NATIVE,
    options: EngineOptions | Sequence[EngineOptions] | None = None,
    prompt_tokens: int | Sequence[int] = 128,
    output_tokens: int | Sequence[int] = 32,
    repetitions: int | None = None,
    time_s: float | None = None,
    seed: int = 0,
    with_peak_memory: bool = False,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure the cost of models side by side.

    Args:
        models: paths (checkpoints, artifacts, bare config.json files) or candidates made by the caller.
        runtime: the engine to run on; several make several rows of each, interleaved.
        options: how to open those given as paths; several make several rows of each.
        prompt_tokens, output_tokens: lengths of each request; several are crossed and take turns.
        repetitions: after a discarded round; None goes on until every time per token is known within 2%.
        time_s: seconds that the repetitions may take; 20 for each pair of lengths by default.
        with_peak_memory: also run each one that has a path in a fresh process.

    Returns:
        A BenchReport whose rows hold weights, engine memory, KV bytes, times and rates; decode figures carry
        the share of the read bandwidth in their conditions, prefill figures that of the arithmetic ceiling.
        The notes hold ratios to each model's first row, paired by repetition.

    Raises:
        InputError: lengths that a model's context does not hold, or none at all.
    """
    variants = list(options) if isinstance(options, Sequence) else [options or EngineOptions()]
    runtimes = [runtime] if isinstance(runtime, str) else list(dict.fromkeys(runtime))
    lengths = [Lengths(*pair) for pair in product(_several(prompt_tokens), _several(output_tokens))]
    if not (lengths and runtimes):
        raise InputError("There is nothing to measure: give at least one prompt length, output length and runtime.")
    given = candidates_of(models, variants)
    candidates = [_on(item, name, len(runtimes) > 1) for item in given for name in runtimes]
    groups = _groups(candidates)
    notes = [f"all candidates do not fit in memory together; measured in {len(groups)} groups"] * (len(groups) > 1)
    ceilings = Ceilings()
    rows: list[BenchRow] = []
    isa, threads = "", 0
    for group in groups:
        with ExitStack() as stack:
            engines = [_open(item, max(one.context for one in lengths), stack) for item in group]
            runs = _timed(engines, lengths, repetitions, time_s, seed, stack, progress)
            rows += _rows(group, engines, runs, ceilings, with_peak_memory)
            notes += [line for run in runs for line in _ratios(group, run, len(runs) > 1)]
            isa, threads = engines[0].isa, engines[0].threads
    return bench_report(rows, [*notes, *ceilings.notes()], isa=isa, threads=threads, seed=seed)


def _several(given: int | Sequence[int]) -> list[int]:
    return [given] if isinstance(given, int) else list(dict.fromkeys(given))


def _on(item: BenchCandidate, runtime: str, several: bool) -> BenchCandidate:
    return replace(item, runtime=runtime, form=f"{item.form} {runtime}" if several else item.form)


def _timed(
    engines: Sequence[Engine],
    lengths: Sequence[Lengths],
    repetitions: int | None,
    time_s: float | None,
    seed: int,
    stack: ExitStack,
    progress: Progress | None,
) -> list[SpeedRun]:
    """A run for each pair of lengths, all repetitions made."""
    named = {str(index): engine for index, engine in enumerate(engines)}
    shortest = min(engine.max_context for engine in engines)
    runs = []
    for one in lengths:
        if one.prompt + one.output > shortest:
            raise InputError(
                f"{one.prompt} prompt and {one.output} output tokens do not fit the context of {shortest}. "
                "Ask for fewer."
            )
        runs.append(SpeedRun(named, prompt_tokens=one.prompt, output_tokens=one.output, seed=seed))
        stack.callback(runs[-1].close)
    for run in runs:
        run.warm_up()
    if repetitions is None:
        repeat_until_settled(runs, time_limit_s=time_s, progress=progress, what="bench")
    else:
        repeat_for(runs, repetitions, time_limit_s=time_s, progress=progress, what="bench")
    return runs


def _rows(
    group: Sequence[BenchCandidate],
    engines: Sequence[Engine],
    runs: Sequence[SpeedRun],
    ceilings: Ceilings,
    with_peak_memory: bool,
) -> list[BenchRow]:
    """A row for each candidate and pair of lengths."""
    prompts, outputs = ({getattr(run, part) for run in runs} for part in ("prompt_tokens", "output_tokens"))
    many_threads = len({engine.threads for engine in engines}) > 1
    sweep = "prompt" if len(prompts) > 1 else "threads" if many_threads else ""
    found = [run.results() for run in runs]
    rows = []
    for index, (item, engine) in enumerate(zip(group, engines, strict=True)):
        for run, speeds in zip(runs, found, strict=True):
            here = Lengths(run.prompt_tokens, run.output_tokens)
            words = [f"prompt {here.prompt}"] * (len(prompts) > 1) + [f"output {here.output}"] * (len(outputs) > 1)
            line = " ".join([item.form, *words[len(prompts) > 1 :]])
            place: dict[str, str | int | float] = {
                "form": item.form, "runtime": item.runtime, "prompt_tokens": here.prompt,
                "output_tokens": here.output,
            }  # fmt: skip
            if sweep:
                swept = thread_words(engine.threads)
                place |= {"sweep": sweep, "line": line.replace(swept, "") if sweep == "threads" else line}
            measured = with_shares(
                speeds[str(index)], item.model, engine.kv_cache, here.context, engine.threads, ceilings
            )
            measured = _memory(engine, here.context, len(runs) > 1, place) | measured
            if with_peak_memory:
                measured["peak_memory_bytes"] = _peak(item, here)
            rows.append(bench_row(item, " ".join([item.form, *words]), measured))
    return rows


def _memory(engine: Engine, context: int, several: bool, place: dict[str, str | int | float]) -> dict[str, Measurement]:
    """What the engine holds at this context, whatever longer one it was opened with, where it can say so."""
    if several and context < engine.max_context and hasattr(engine, "open_sequences"):
        there: dict[str, str | int | float] = {
            "context": context, "kv_cache": engine.kv_cache, "threads": engine.threads, "isa": engine.isa
        }  # fmt: skip
        found = memory_measurements(engine, batch_engine(engine).open_sequences(1, max_context=context).memory(), there)
    else:
        found = engine_memory(engine)
    return {metric: one.model_copy(update={"conditions": {**one.conditions, **place}}) for metric, one in found.items()}


def _peak(item: BenchCandidate, lengths: Lengths) -> Measurement:
    if item.path is None:
        reason = "this form exists in this process alone; write it with `trilemma compress` and measure the folder"
        return Measurement.unavailable("peak_memory_bytes", reason)
    return peak_memory(
        item.path, prompt_tokens=lengths.prompt, output_tokens=lengths.output, runtime=item.runtime,
        options=item.options,
    )  # fmt: skip


def _ratios(group: Sequence[BenchCandidate], run: SpeedRun, several_lengths: bool) -> list[str]:
    """Each candidate against the first of the same model: times paired by repetition, in words."""
    firsts: dict[str, int] = {}
    lines = []
    where = f", prompt {run.prompt_tokens}, output {run.output_tokens}" * several_lengths
    for index, item in enumerate(group):
        base = firsts.setdefault(item.name, index)
        if base != index:
            token, first = (run.relative(str(base), str(index), metric) for metric in ("tpot_s", "ttft_s"))
            lines.append(
                f"{item.name} {item.form} against {group[base].form}{where}: time per token {_times(token)}, "
                f"first token {_times(first)}"
            )
    return lines


def _times(ratio: Interval) -> str:
    return f"x{ratio.value:.2f}" + ("" if ratio.low is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]")


def candidates_of(
    models: str | Path | BenchCandidate | Iterable[str | Path | BenchCandidate], variants: Sequence[EngineOptions]
) -> list[BenchCandidate]:
    """Each model given as a path in each variant of options; candidates as they are."""
    given = [models] if isinstance(models, str | Path | BenchCandidate) else list(models)
    return [item for one in given for item in _candidates(one, list(variants))]


def bench_report(rows: Sequence[BenchRow], notes: Sequence[str], *, isa: str, threads: int, seed: int) -> BenchReport:
    """Rows with the environment and the command that was typed."""
    return BenchReport(
        environment=read_environment(isa=isa, threads=threads, seed=seed), rows=tuple(rows),
        command=command_line(), notes=tuple(notes),
    )  # fmt: skip


def bench_row(item: BenchCandidate, name: str, found: dict[str, Measurement]) -> BenchRow:
    """One line of a report; `name` says the form, and in sweeps the place."""
    return BenchRow(
        model=item.name,
        parameters=parameter_count(item.model.config),
        random_weights=bool(getattr(item.model.source, "random", False)),
        trial=Trial(name=name, recipe=item.recipe, status="measured", measurements=found),
    )


def _candidates(given: str | Path | BenchCandidate, options: list[EngineOptions]) -> list[BenchCandidate]:
    if isinstance(given, BenchCandidate):
        return [given]
    path, name = Path(given), short_name(given)
    model = load_any(given)
    return [
        BenchCandidate(name, form_of(_formats(model), variant, options), model, variant,
                       path=path if path.exists() else None)
        for variant in options
    ]  # fmt: skip


def form_of(base: str, options: EngineOptions, variants: Sequence[EngineOptions]) -> str:
    """A form's name with its cache, where one was asked for, and its threads, where several numbers were."""
    words = [base, *([f"kv-{options.kv_cache}"] if options.kv_cache else [])]
    several = len({variant.threads for variant in variants}) > 1
    return " ".join(words) + (thread_words(options.threads) if several and options.threads else "")


def thread_words(threads: int) -> str:
    """' 1 thread', as forms carry it."""
    return " 1 thread" if threads == 1 else f" {threads} threads"


def _formats(model: Model) -> str:
    return ",".join(dict.fromkeys(model.format_of(name) for name in model.config.linear_names()))


def _groups(candidates: list[BenchCandidate]) -> list[list[BenchCandidate]]:
    room = MEMORY_SHARE * (total_memory_bytes() or 8e9)
    groups: list[list[BenchCandidate]] = [[]]
    held = 0.0
    for item in candidates:
        size = weights_bytes(item.model)
        if groups[-1] and held + size > room:
            groups.append([])
            held = 0.0
        groups[-1].append(item)
        held += size
    return [group for group in groups if group]


def _open(item: BenchCandidate, context: int, stack: ExitStack) -> Engine:
    options = item.options
    if options.max_context is None and context <= item.model.config.max_context:
        options = options.model_copy(update={"max_context": context})
    engine = open_engine(item.model, runtime=item.runtime, options=options)
    stack.callback(engine.close)
    return engine


__all__: Sequence[str] = [
    "BenchCandidate", "bench", "bench_report", "bench_row", "candidates_of", "decode_bytes", "form_of"
]  # fmt: skip
