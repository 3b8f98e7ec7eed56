"""What a fresh process will reach at its highest, before anything is opened: arithmetic above an empty process.

The peak is that of two moments: while the last tensors are read (what is loaded so far, and the one that is being
read), or at the end of the prompt (all weights, the part of the cache that was written, scratch, logits). Beside them
stand a process that opened nothing (measured, or stated) and a record for each tensor. What the engine itself will
count is told by `trilemma.runtime.memory_forecast`. No weight is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from trilemma.core.measurement import Measurement
from trilemma.core.record import Record
from trilemma.formats.pack import format_bytes
from trilemma.measure.memory.held import empty_process_bytes
from trilemma.model.config import DecoderConfig
from trilemma.model.cost import kv_bytes_per_token
from trilemma.model.model import Model
from trilemma.runtime.engine import KvCache
from trilemma.runtime.memory_forecast import ActivationOf, EngineMemoryForecast, FormatOf, forecast_engine_of
from trilemma.runtime.native_weights import loading_order

PEAK_ERROR, PEAK_ERROR_BYTES = 0.05, 20e6
"""Half the interval of a predicted peak: relative, and beside it in bytes; docs/concepts/memory.md has the errors."""

TENSOR_BYTES = 2_000
"""Names, shapes and records of one tensor, in Python and in the engine; fitted on mixtures of many experts."""

THREAD_BYTES = 100_000
"""Touched stack and bookkeeping of one worker thread."""

READING_BYTES = 4_000_000
"""Beside a tensor while it is read: the part that is searched for NaN, and what the allocator keeps."""

RUNNING_BYTES = 2_500_000
"""Code that runs for the first time, stacks, lists of tokens."""

FIRST_REGION, REGION, HUGE_PAGE = 8 << 20, 64 << 20, 2 << 20
"""Weights beyond the first region lie in regions on huge pages (native/engine/arena.cpp); the last page of each is
half empty on average."""

PAGE = 4096
BLOCK = 16  # positions that the cache is padded to


class ProcessPeakForecast(Record):
    """Parts of the highest resident set of a process that opens, prefills and decodes.

    empty_process_bytes: a process that imports what a run imports and opens nothing; records_bytes: names and shapes;
    loading_bytes: weights at the worst moment of reading them, the tensor that is being read included;
    running_bytes: weights, cache that was written, scratch, logits. Both with the gaps between weights.
    """

    empty_process_bytes: int
    records_bytes: int
    loading_bytes: int
    running_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.empty_process_bytes + self.records_bytes + max(self.loading_bytes, self.running_bytes)

    @property
    def when(self) -> Literal["loading", "running"]:
        """The moment of the peak."""
        return "loading" if self.loading_bytes > self.running_bytes else "running"


class MemoryForecast(Record):
    """Engine and process, and whether the shapes are certain (`exact`: no step chooses them by looking at weights)."""

    engine: EngineMemoryForecast
    process: ProcessPeakForecast
    prompt_tokens: int
    output_tokens: int
    threads: int
    exact: bool = True

    def measurements(self, config: DecoderConfig) -> dict[str, Measurement]:
        """weights_bytes, engine_memory_bytes, peak_memory_bytes and kv_bytes_per_token, marked as estimates."""
        engine, process = self.engine, self.process
        lengths: dict[str, str | int | float] = {
            "prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens, "context": engine.context,
            "kv_cache": engine.kv_cache, "threads": self.threads,
        }  # fmt: skip
        parts = {"weights_bytes": engine.weights_bytes, "kv_bytes": engine.kv_bytes,
                 "scratch_bytes": engine.scratch_bytes}  # fmt: skip
        counted = "the sizes that the native engine reserves, by arithmetic; nothing was loaded"
        margin = PEAK_ERROR * process.peak_bytes + PEAK_ERROR_BYTES
        values = {
            "weights_bytes": engine.weights_bytes,
            "engine_memory_bytes": engine.total_bytes,
            "kv_bytes_per_token": kv_bytes_per_token(config, engine.kv_cache),
        }
        found = {
            name: Measurement.of(name, value, source="estimated", method=counted, conditions=lengths | parts)
            for name, value in values.items()
        }
        found["peak_memory_bytes"] = Measurement.of(
            "peak_memory_bytes",
            process.peak_bytes,
            source="estimated",
            method="an empty process, and weights, cache and scratch at the worst moment, by arithmetic",
            ci95=(process.peak_bytes - margin, process.peak_bytes + margin),
            conditions=lengths | process.model_dump() | {"peak_while": process.when},
        )
        return found


def forecast_memory(
    model: Model,
    *,
    prompt_tokens: int,
    output_tokens: int,
    kv: KvCache | None = None,
    threads: int = 1,
    empty_bytes: int | None = None,
) -> MemoryForecast:
    """What opening a model in its own form, prefilling and decoding will hold; see `forecast_memory_of`."""
    reading = getattr(model.source, "reading_bytes", None)
    return forecast_memory_of(
        model.config, model.format_of, lambda name: model.linear(name).activation, prompt_tokens=prompt_tokens,
        output_tokens=output_tokens, kv=kv or model.run.kv_cache, threads=threads, empty_bytes=empty_bytes,
        reading=None if model.replaced else reading,
    )  # fmt: skip


def forecast_memory_of(
    config: DecoderConfig,
    format_of: FormatOf,
    activation_of: ActivationOf,
    *,
    prompt_tokens: int,
    output_tokens: int,
    kv: KvCache,
    threads: int = 1,
    empty_bytes: int | None = None,
    reading: Callable[[str], int] | None = None,
    exact: bool = True,
) -> MemoryForecast:
    """What a model of these shapes and formats will hold on the native engine, alone in its process.

    Args:
        format_of, activation_of: of every matrix.
        prompt_tokens, output_tokens: of one request; the context is exactly these.
        kv: cache policy.
        empty_bytes: of a process that opened nothing; by default one is started and measured, once.
        reading: bytes held while a tensor is read; by default its own, as from an artifact.

    Raises:
        InputError: lengths that the model's context does not hold.
        UnsupportedModelError: shapes that the engine can not run.
        EngineError: the empty process could not be started.
    """
    tokens = prompt_tokens + output_tokens
    engine = forecast_engine_of(config, format_of, activation_of, context=tokens, kv=kv)
    process = forecast_peak(
        config, engine, format_of, tokens=tokens, threads=threads, reading=reading,
        empty_bytes=empty_process_bytes("native") if empty_bytes is None else empty_bytes,
    )  # fmt: skip
    return MemoryForecast(
        engine=engine, process=process, prompt_tokens=prompt_tokens, output_tokens=output_tokens, threads=threads,
        exact=exact,
    )  # fmt: skip


def forecast_peak(
    config: DecoderConfig,
    engine: EngineMemoryForecast,
    format_of: FormatOf,
    *,
    tokens: int,
    empty_bytes: int,
    threads: int = 1,
    reading: Callable[[str], int] | None = None,
) -> ProcessPeakForecast:
    """The process around an engine whose one sequence reaches `tokens` positions (its context may be longer)."""
    shapes = config.tensor_shapes()

    def held(name: str) -> int:
        shape = shapes[name]
        return format_bytes(format_of(name), (shape[0], shape[1])) if len(shape) == 2 else 4 * shape[0]

    loaded = loading = 0
    for name in loading_order(config):
        loaded += held(name)
        loading = max(loading, loaded + (held(name) if reading is None else reading(name)))
    gaps = 0 if loaded <= FIRST_REGION else (loaded // REGION + 1) * HUGE_PAGE // 2
    logits = 4 * config.vocab_size
    around = RUNNING_BYTES + THREAD_BYTES * (threads - 1)
    running = loaded + gaps + _written(config, engine, tokens) + engine.scratch_bytes + logits + around
    return ProcessPeakForecast(
        empty_process_bytes=empty_bytes, records_bytes=TENSOR_BYTES * len(shapes),
        loading_bytes=loading + gaps + READING_BYTES, running_bytes=running,
    )  # fmt: skip


def _written(config: DecoderConfig, engine: EngineMemoryForecast, tokens: int) -> int:
    """Bytes of the cache's pages that `tokens` positions touch; a head's positions lie together."""
    positions = min(-(-tokens // BLOCK) * BLOCK, engine.context)
    if positions >= engine.context:
        return engine.kv_bytes
    runs = sum(2 * layer.attention.kv_heads for layer in config.layers if layer.attention is not None)
    return min(engine.kv_bytes, engine.kv_bytes * positions // engine.context + PAGE * runs)


__all__ = [
    "PEAK_ERROR",
    "PEAK_ERROR_BYTES",
    "MemoryForecast",
    "ProcessPeakForecast",
    "forecast_memory",
    "forecast_memory_of",
    "forecast_peak",
]
