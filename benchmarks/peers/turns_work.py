"""What turns_worker.py times: each kind of work as a function that does it once and gives its seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from layer_products import LayerProducts

from trilemma import _native
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions
from trilemma.runtime.native import NativeEngine, Step

Work = Callable[[], float]
STEPS = 32  # of a decode, whose mean is taken
BATCH_DEPTH = 128


def open_work(task: dict[str, Any]) -> tuple[Work, str]:
    """The work that `task` names, its model opened, and the instruction set in use."""
    kind, count, threads = task["kind"], task["count"], int(task["threads"])
    if kind == "products":
        products = LayerProducts(task["model"], threads)
        return lambda: products.walk(count, passes=1)[0], os.environ.get("TRILEMMA_ISA") or _native.supported_isas()[-1]
    context = {"prefill": count, "decode": count + STEPS + 8, "batch": BATCH_DEPTH + STEPS + 8}[kind]
    options = EngineOptions(threads=threads, kv_cache=task["kv"], max_context=context)
    engine = open_engine(task["model"], options=options)
    if not isinstance(engine, NativeEngine):
        raise TypeError("benchmarks/builds.py measures the native engine")
    engine.settle()
    return {"prefill": _prefill, "decode": _decode, "batch": _batch}[kind](engine, count), engine.isa


def _tokens(engine: NativeEngine, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, engine.config.vocab_size, shape).astype(np.int32)


def _prefill(engine: NativeEngine, count: int) -> Work:
    tokens = _tokens(engine, count)

    def once() -> float:
        began = time.perf_counter()
        engine.logits(tokens, last_only=True)
        return time.perf_counter() - began

    return once


def _decode(engine: NativeEngine, depth: int) -> Work:
    return _steps(engine, _tokens(engine, 1, max(1, depth)))


def _batch(engine: NativeEngine, count: int) -> Work:
    return _steps(engine, _tokens(engine, count, BATCH_DEPTH))


def _steps(engine: NativeEngine, rows: np.ndarray) -> Work:
    """Seconds of a step of as many sequences as there are rows, from behind their tokens on."""
    room = engine.open_sequences(len(rows), max_context=rows.shape[1] + STEPS + 8)
    held = [room.create() for _ in rows]
    for sequence, row in zip(held, rows, strict=True):
        room.forward([Step(sequence, row, "none")])
    one = [Step(sequence, row[:1]) for sequence, row in zip(held, rows, strict=True)]

    def once() -> float:
        for sequence in held:
            room.truncate(sequence, rows.shape[1])
        began = time.perf_counter()
        for _ in range(STEPS):
            room.forward(one)
        return (time.perf_counter() - began) / STEPS

    return once
