"""Our engine in a fresh process: opens an artifact, takes times. Prints one JSON object on its last line.

python ours_worker.py '{"model": ARTIFACT, "threads": 2, "kv": "bf16", "cells": [...]}'
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from trilemma.measure.memory.peak_process import peak_resident_bytes
from trilemma.runtime import SamplingSettings, open_engine
from trilemma.runtime.engine import EngineOptions
from trilemma.runtime.native import NativeEngine, Step

PART = 512  # positions of a long prompt that go through the model together while a cache is filled


def prefill(engine: NativeEngine, cell: dict[str, Any]) -> list[float]:
    tokens = _tokens(engine, cell["tokens"])
    seconds = []
    for _ in range(cell["repeats"] + 1):
        began = time.perf_counter()
        engine.logits(tokens, last_only=True)
        seconds.append(time.perf_counter() - began)
    return [cell["tokens"] / each for each in seconds[1:]]


def decode(engine: NativeEngine, cell: dict[str, Any]) -> list[float]:
    """Tokens a second of all sequences together, one figure a repeat."""
    if cell["batch"] > 1:
        return decode_batch(engine, cell)
    settings = SamplingSettings(max_tokens=cell["tokens"] + 1, ignore_eos=True)
    prompt = _tokens(engine, max(1, cell["depth"])).tolist()
    if cell["depth"] < 2048:
        engine.generate(prompt, SamplingSettings(max_tokens=4, ignore_eos=True))
    rates = []
    for _ in range(cell["repeats"]):
        times = engine.generate(prompt, settings).token_times_s
        rates.append((len(times) - 1) / (times[-1] - times[0]))
    return rates


def decode_batch(engine: NativeEngine, cell: dict[str, Any]) -> list[float]:
    batch, depth, steps = cell["batch"], cell["depth"], cell["tokens"]
    room = engine.open_sequences(batch, max_context=depth + steps + 8)
    held = [room.create() for _ in range(batch)]
    rows = np.random.default_rng(0).integers(3, engine.config.vocab_size, (batch, depth)).astype(np.int32)
    for sequence, row in zip(held, rows, strict=True):
        for at in range(0, depth, PART):
            room.forward([Step(sequence, row[at : at + PART], "none")])
    rates = []
    for turn in range(cell["repeats"] + 1):
        for sequence in held:
            room.truncate(sequence, depth)
        one = [Step(sequence, row[:1]) for sequence, row in zip(held, rows, strict=True)]
        count = steps if turn else 4
        began = time.perf_counter()
        for _ in range(count):
            room.forward(one)
        rates.append(batch * count / (time.perf_counter() - began))
    return rates[1:]


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
    work = {"prefill": prefill, "decode": decode}
    rates = [work[cell["kind"]](engine, cell) for cell in task["cells"]]
    memory = engine.memory()
    print(json.dumps({
        "rates": rates, "open_s": opened, "peak_bytes": peak_resident_bytes(), "version": engine.isa,
        "weights_bytes": memory.weights_bytes, "kv_bytes": memory.kv_bytes, "scratch_bytes": memory.scratch_bytes,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
