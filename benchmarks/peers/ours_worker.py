"""Our engine in a fresh process: opens an artifact, takes times. Prints one JSON object on its last line.

python ours_worker.py '{"model": ARTIFACT, "threads": 2, "kv": "bf16", "cells": [...]}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from trilemma.measure.device.ceilings import read_bandwidth
from trilemma.measure.memory.peak_process import peak_resident_bytes
from trilemma.runtime import SamplingSettings, open_engine
from trilemma.runtime.engine import EngineOptions
from trilemma.runtime.native import NativeEngine, SequenceBatch, Step

Timed = tuple[list[float], list[float]]  # tokens a second, and what a probe beside each of them read, bytes a second

DEEP = 2048  # from here on a cache is filled once for all repeats
PART = 512  # positions of a long prompt that go through the model together while a cache is filled


def prefill(engine: NativeEngine, cell: dict[str, Any]) -> Timed:
    tokens = _tokens(engine, cell["tokens"])
    seconds = []
    for _ in range(cell["repeats"] + 1):
        began = time.perf_counter()
        engine.logits(tokens, last_only=True)
        seconds.append(time.perf_counter() - began)
    return [cell["tokens"] / each for each in seconds[1:]], []


def decode(engine: NativeEngine, cell: dict[str, Any]) -> Timed:
    """Tokens a second of one sequence by `generate`, one figure a repeat."""
    settings = SamplingSettings(max_tokens=cell["tokens"] + 1, ignore_eos=True)
    prompt = _tokens(engine, max(1, cell["depth"])).tolist()
    engine.generate(prompt, SamplingSettings(max_tokens=4, ignore_eos=True))

    def once() -> float:
        times = engine.generate(prompt, settings).token_times_s
        return (len(times) - 1) / (times[-1] - times[0])

    return _beside_probes(engine, cell, once)


def decode_deep(engine: NativeEngine, cells: list[dict[str, Any]]) -> list[Timed]:
    """The same at growing depths of one sequence: its cache is filled once, steps are forgotten after each repeat."""
    room = engine.open_sequences(1, max_context=max(cell["context"] for cell in cells))
    sequence = room.create()
    tokens = _tokens(engine, cells[-1]["depth"])
    found = []
    for cell in cells:
        _fill(room, sequence, tokens[: cell["depth"]])
        found.append(_rates(engine, room, [sequence], tokens[:1, None], cell))
    return found


def decode_batch(engine: NativeEngine, cell: dict[str, Any]) -> Timed:
    """Tokens a second of all sequences together, one figure a repeat."""
    batch, depth = cell["batch"], cell["depth"]
    room = engine.open_sequences(batch, max_context=depth + cell["tokens"] + 8)
    held = [room.create() for _ in range(batch)]
    rows = np.random.default_rng(0).integers(3, engine.config.vocab_size, (batch, depth)).astype(np.int32)
    for sequence, row in zip(held, rows, strict=True):
        _fill(room, sequence, row)
    return _rates(engine, room, held, rows, cell)


def _fill(room: SequenceBatch, sequence: int, tokens: np.ndarray) -> None:
    """Take the sequence on to all of `tokens`."""
    for at in range(room.length(sequence), len(tokens), PART):
        room.forward([Step(sequence, tokens[at : at + PART], "none")])


def _rates(engine: NativeEngine, room: SequenceBatch, held: list[int], rows: np.ndarray, cell: dict[str, Any]) -> Timed:
    """Steps of all sequences from the cell's depth on, again and again."""
    one = [Step(sequence, row[:1]) for sequence, row in zip(held, rows, strict=True)]

    def back() -> None:
        for sequence in held:
            room.truncate(sequence, cell["depth"])

    def run(count: int) -> float:
        back()
        began = time.perf_counter()
        for _ in range(count):
            room.forward(one)
        return len(held) * count / (time.perf_counter() - began)

    run(4)
    found = _beside_probes(engine, cell, lambda: run(cell["tokens"]))
    back()
    return found


def _beside_probes(engine: NativeEngine, cell: dict[str, Any], once: Callable[[], float]) -> Timed:
    """A rate for each repeat, and the better of two probes of memory, just before it and just after."""
    reads, rates = [_read(engine)], []
    for _ in range(cell["repeats"]):
        rates.append(once())
        reads.append(_read(engine))
    return rates, [max(pair) for pair in pairwise(reads)]


def _read(engine: NativeEngine) -> float:
    return read_bandwidth(engine.threads, engine.memory().weights_bytes).bytes_per_s


def rates_of(engine: NativeEngine, cells: list[dict[str, Any]]) -> list[Timed]:
    """Cells of one group, of one kind and in ascending depth."""
    if cells[0]["kind"] == "prefill":
        return [prefill(engine, cell) for cell in cells]
    if cells[0]["batch"] > 1:
        return [decode_batch(engine, cell) for cell in cells]
    if cells[0]["depth"] >= DEEP:
        return decode_deep(engine, cells)
    return [decode(engine, cell) for cell in cells]


def _tokens(engine: NativeEngine, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, engine.config.vocab_size, count).astype(np.int32)


def main() -> None:
    task = json.loads(sys.argv[1])
    began = time.perf_counter()
    context = max(cell["context"] for cell in task["cells"])
    options = EngineOptions(threads=task["threads"], kv_cache=task["kv"], max_context=context)
    engine = open_engine(task["model"], options=options)
    opened = time.perf_counter() - began
    if not isinstance(engine, NativeEngine):
        raise TypeError("benchmarks/engines.py measures the native engine")
    engine.settle()
    rates, reads = zip(*rates_of(engine, task["cells"]), strict=True)
    memory = engine.memory()
    peak = {} if any(reads) else {"peak_bytes": peak_resident_bytes()}  # a probe's own memory is no engine's
    print(json.dumps({
        "rates": rates, "reads": reads, "open_s": opened, **peak, "version": engine.isa,
        "weights_bytes": memory.weights_bytes, "kv_bytes": memory.kv_bytes, "scratch_bytes": memory.scratch_bytes,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
