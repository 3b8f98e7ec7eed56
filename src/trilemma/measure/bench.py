"""What models cost on this machine: memory by the engine's own count, time interleaved, share of the bandwidth.

Quality has no place here: shapes with random weights are welcome. Candidates that do not fit in
memory together are measured in groups, with a note.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from trilemma.core.environment import command_line, read_environment, total_memory_bytes
from trilemma.core.measurement import Measurement
from trilemma.core.recipe import Recipe
from trilemma.core.results import BenchReport, BenchRow
from trilemma.core.trial import Trial
from trilemma.formats.artifact import load_any, short_name, weights_bytes
from trilemma.formats.pack import format_bytes
from trilemma.measure.device.ceilings import Bandwidth, read_bandwidth, roofline_share
from trilemma.measure.memory.held import engine_memory, peak_memory
from trilemma.measure.timing.settle import Progress
from trilemma.measure.timing.speed import SpeedRun
from trilemma.model.cost import decode_bytes_per_token, parameter_count
from trilemma.model.model import Model
from trilemma.runtime import open_engine
from trilemma.runtime.engine import Engine, EngineOptions

MEMORY_SHARE = 0.6  # of the machine's memory that the candidates of one group may fill


@dataclass(frozen=True)
class BenchCandidate:
    """One model in one form. `path` lets its peak memory be measured in a fresh process."""

    name: str
    form: str
    model: Model
    options: EngineOptions = field(default_factory=EngineOptions)
    recipe: Recipe = field(default_factory=Recipe)
    path: Path | None = None


def bench(
    models: str | Path | Iterable[str | Path | BenchCandidate],
    *,
    runtime: str = "native",
    options: EngineOptions | Sequence[EngineOptions] | None = None,
    prompt_tokens: int = 128,
    output_tokens: int = 32,
    repetitions: int = 5,
    seed: int = 0,
    with_peak_memory: bool = False,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure the cost of models side by side.

    Args:
        models: paths (checkpoints, artifacts, bare config.json files) or candidates made by the caller.
        runtime: the engine to run on.
        options: how to open those given as paths; several make several rows of each.
        prompt_tokens, output_tokens: lengths of each request.
        repetitions: after a discarded round; all candidates interleaved.
        with_peak_memory: also run each one that has a path in a fresh process.

    Returns:
        A BenchReport whose rows hold weights, engine memory, KV bytes, times and rates; `tpot_s` carries
        the share of the read bandwidth in its conditions.

    Raises:
        InputError: lengths that a model's context does not hold.
    """
    variants = list(options) if isinstance(options, Sequence) else [options or EngineOptions()]
    candidates = candidates_of(models, variants)
    context = prompt_tokens + output_tokens
    groups = _groups(candidates)
    notes = [f"all candidates do not fit in memory together; measured in {len(groups)} groups"] * (len(groups) > 1)
    bandwidths: dict[tuple[int, int], Bandwidth] = {}
    rows: list[BenchRow] = []
    isa, threads = "", 0
    for group in groups:
        with ExitStack() as stack:
            engines = [_open(item, runtime, context, stack) for item in group]
            named = {str(index): engine for index, engine in enumerate(engines)}
            run = SpeedRun(named, prompt_tokens=prompt_tokens, output_tokens=output_tokens, seed=seed)
            stack.callback(run.close)
            run.warm_up()
            for turn in range(repetitions):
                run.repeat()
                if progress is not None:
                    progress(turn + 1, repetitions, "bench")
            speeds = run.results()
            for index, item in enumerate(group):
                found = {**engine_memory(engines[index]), **speeds[str(index)]}
                _add_roofline(found, item, engines[index], context, bandwidths)
                if with_peak_memory and item.path is not None:
                    found["peak_memory_bytes"] = peak_memory(
                        item.path, prompt_tokens=prompt_tokens, output_tokens=output_tokens, runtime=runtime,
                        options=item.options,
                    )  # fmt: skip
                rows.append(bench_row(item, item.form, found))
            isa, threads = engines[0].isa, engines[0].threads
    notes += [
        f"read bandwidth {b.bytes_per_s / 1e9:.1f} GB/s over {b.working_set_bytes / 1e6:.0f} MB, {b.threads} threads"
        for b in bandwidths.values()
    ]
    return bench_report(rows, notes, isa=isa, threads=threads, seed=seed)


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


def decode_bytes(model: Model, kv_cache: str, context: int) -> int:
    """Bytes that one decode step reads at a context length: matrices, one embedding row, the cache."""
    return decode_bytes_per_token(model.config, model.format_of, kv_cache, context, format_bytes)


def _candidates(given: str | Path | BenchCandidate, options: list[EngineOptions]) -> list[BenchCandidate]:
    if isinstance(given, BenchCandidate):
        return [given]
    path, name = Path(given), short_name(given)
    model = load_any(given)
    return [
        BenchCandidate(name, _form(model, variant), model, variant, path=path if path.exists() else None)
        for variant in options
    ]


def _form(model: Model, options: EngineOptions) -> str:
    formats: dict[str, None] = {}
    for name in model.config.linear_names():
        formats.setdefault(model.format_of(name))
    return " ".join([",".join(formats), *([f"kv-{options.kv_cache}"] if options.kv_cache else [])])


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


def _open(item: BenchCandidate, runtime: str, context: int, stack: ExitStack) -> Engine:
    options = item.options
    if options.max_context is None and context <= item.model.config.max_context:
        options = options.model_copy(update={"max_context": context})
    engine = open_engine(item.model, runtime=runtime, options=options)
    stack.callback(engine.close)
    return engine


def _add_roofline(
    found: dict[str, Measurement],
    item: BenchCandidate,
    engine: Engine,
    context: int,
    bandwidths: dict[tuple[int, int], Bandwidth],
) -> None:
    """Put bytes a token, the ceiling and the share of it beside the decode figures."""
    tokens_per_s = found["decode_tokens_per_s"].value
    read = decode_bytes(item.model, engine.kv_cache, context)
    key = (engine.threads, read)
    if key not in bandwidths:
        bandwidths[key] = read_bandwidth(engine.threads, read)
    ceiling = bandwidths[key]
    share = roofline_share(read, tokens_per_s or 0.0, ceiling)
    stated = {
        "decode_bytes_per_token": read,
        "read_bandwidth_bytes_per_s": ceiling.bytes_per_s,
        "roofline_share": share,
    }
    for metric in ("tpot_s", "decode_tokens_per_s"):
        old = found[metric]
        found[metric] = old.model_copy(update={"conditions": {**old.conditions, **stated}})


__all__: Sequence[str] = ["BenchCandidate", "bench", "bench_report", "bench_row", "candidates_of", "decode_bytes"]
