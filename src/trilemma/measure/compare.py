"""Models side by side: bytes, memory, time, and on a text also quality; all paired to the first."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from trilemma.core.environment import read_environment
from trilemma.core.errors import InputError
from trilemma.core.measurement import Measurement
from trilemma.data.documents import Prepare
from trilemma.data.windows import TokenSet
from trilemma.formats.artifact import load_any
from trilemma.measure.energy.model_energy import model_energy
from trilemma.measure.memory.held import artifact_bytes, engine_memory
from trilemma.measure.quality.evaluate import DEFAULT_TOKENS, Paths, build_reference, choose_context, read_token_set
from trilemma.measure.quality.figures import evaluate as evaluate_quality
from trilemma.measure.results import CompareResult, CompareRow
from trilemma.measure.timing.settle import Progress
from trilemma.measure.timing.speed import RelativeTimes, SpeedRun, relative_times
from trilemma.model.model import Model
from trilemma.runtime import open_engine
from trilemma.runtime.engine import Engine, EngineOptions


def compare(
    models: Sequence[str | Path] | Mapping[str, Model | str | Path],
    data: Paths | Mapping[str, Paths] | None = None,
    *,
    context: int | None = None,
    max_tokens: int | None = DEFAULT_TOKENS,
    prepare: Prepare = "none",
    prompt_tokens: int = 128,
    output_tokens: int = 32,
    repetitions: int = 5,
    runtime: str = "native",
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> CompareResult:
    """Measure models next to each other; the first is the reference.

    Args:
        models: paths, or name -> model or path.
        data: text files (or domain -> files); without them there is no quality.
        context, max_tokens, prepare: of the quality windows, as in `evaluate`.
        prompt_tokens, output_tokens, repetitions: of the timing, interleaved.

    Raises:
        InputError: fewer than two models, or lengths that do not fit.
        DataError: texts that can not be used.
    """
    given = dict(models) if isinstance(models, Mapping) else _named(models)
    if len(given) < 2:
        raise InputError(f"Comparing needs two or more models; got {len(given)}.")
    loaded = {name: item if isinstance(item, Model) else load_any(item) for name, item in given.items()}
    found = {name: _on_disk(item) for name, item in given.items()}
    first = next(iter(loaded.values()))
    chosen = options or EngineOptions()
    length = None if data is None else choose_context(first, context)
    longest = max(prompt_tokens + output_tokens, length or 0)
    notes: list[str] = []
    with ExitStack() as stack:
        engines = {name: _open(model, runtime, chosen, longest, stack) for name, model in loaded.items()}
        relative = _measure_time(engines, found, prompt_tokens, output_tokens, repetitions, progress)
        for name, model in loaded.items():
            found[name] |= model_energy(
                model, engines[name], found[name], prompt_tokens=prompt_tokens, output_tokens=output_tokens
            )
        if data is not None and length is not None:
            token_set = read_token_set(first, data, length, max_tokens, prepare)
            notes = _measure_quality(first, engines, found, token_set, runtime, chosen, progress)
        engine = next(iter(engines.values()))
        environment = read_environment(isa=engine.isa, threads=engine.threads)
    rows = [CompareRow(name=name, measurements=found[name], relative=relative[name]) for name in loaded]
    return CompareResult(context=length, environment=environment, rows=tuple(rows), notes=tuple(notes))


def _measure_time(
    engines: dict[str, Engine],
    found: dict[str, dict[str, Measurement]],
    prompt_tokens: int,
    output_tokens: int,
    repetitions: int,
    progress: Progress | None,
) -> dict[str, RelativeTimes]:
    run = SpeedRun(engines, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    try:
        run.warm_up()
        for turn in range(repetitions):
            run.repeat()
            if progress is not None:
                progress(turn + 1, repetitions, "speed")
        for name, measured in run.results().items():
            found[name] |= engine_memory(engines[name]) | measured
    finally:
        run.close()
    base = next(iter(engines))
    relative: dict[str, RelativeTimes] = {}
    for name in engines:
        relative[name] = relative_times(found[base], found[name])
        for metric in ("weights_bytes", "engine_memory_bytes"):
            ratio_ = (found[name][metric].value or 0.0) / (found[base][metric].value or 1.0)
            relative[name][metric] = (ratio_, ratio_, ratio_)
    return relative


def _measure_quality(
    first: Model,
    engines: dict[str, Engine],
    found: dict[str, dict[str, Measurement]],
    token_set: TokenSet,
    runtime: str,
    options: EngineOptions,
    progress: Progress | None,
) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="trilemma-reference-") as folder:
        reference = build_reference(first, token_set, folder, runtime=runtime, options=options, progress=progress)
        for name, engine in engines.items():
            found[name] |= evaluate_quality(engine, reference, progress=progress)
        return list(reference.notes)


def _open(model: Model, runtime: str, options: EngineOptions, longest: int, stack: ExitStack) -> Engine:
    if options.max_context is None:
        options = options.model_copy(update={"max_context": min(model.config.max_context, longest)})
    engine = open_engine(model, runtime=runtime, options=options)
    stack.callback(engine.close)
    return engine


def _on_disk(item: Model | str | Path) -> dict[str, Measurement]:
    path = item.path if isinstance(item, Model) else Path(item)
    return {"artifact_bytes": artifact_bytes(path)} if path is not None and path.exists() else {}


def _named(models: Sequence[str | Path]) -> dict[str, str | Path]:
    """Short names where they differ, the full paths where not."""
    short = [Path(item).name or str(item) for item in models]
    unique = len(set(short)) == len(short)
    full = [str(item) if models.count(item) == 1 else f"{item} #{at}" for at, item in enumerate(models, 1)]
    return dict(zip(short if unique else full, models, strict=True))
