"""What every peer's worker does with its engine: takes times, gives logits, answers one task. Needs numpy alone.

A worker brings a `Session`: an opened model, made of the task, with one set of caches.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Session(Protocol):
    vocab: int

    def __init__(self, task: dict[str, Any]) -> None: ...
    def start(self, batch: int, room: int, filled: int = 0) -> None:
        """Caches for `batch` sequences of up to `room` positions, the first `filled` of them taken by random ones."""

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Append ids (batch, time); logits (batch, 1, vocab) of the last position, valid until the next call."""

    def about(self) -> dict[str, Any]:
        """What the record tells of the engine, its version at least."""


Answer = dict[str, Any]


def prefill(session: Session, cell: Mapping[str, Any]) -> list[float]:
    """Tokens a second of one prompt, one figure a repeat; the first turn warms up."""
    ids = np.random.default_rng(0).integers(3, session.vocab, (1, cell["tokens"]))
    seconds = []
    for _ in range(cell["repeats"] + 1):
        session.start(1, cell["tokens"])
        began = time.perf_counter()
        session.forward(ids)
        seconds.append(time.perf_counter() - began)
    return [cell["tokens"] / each for each in seconds[1:]]


def decode(session: Session, cell: Mapping[str, Any]) -> list[float]:
    """Tokens a second of all sequences together, one figure a repeat."""
    batch, depth, tokens = cell["batch"], cell["depth"], cell["tokens"]
    ids = np.random.default_rng(0).integers(3, session.vocab, (batch, 1))
    rates = []
    for turn in range(cell["repeats"] + 1):
        session.start(batch, depth + tokens + 1, depth)
        session.forward(ids)
        steps = tokens if turn else min(4, tokens)
        began = time.perf_counter()
        for _ in range(steps):
            session.forward(ids)
        rates.append(batch * steps / (time.perf_counter() - began))
    return rates[1:]


def bench(opened: Callable[[dict[str, Any]], Session], task: dict[str, Any]) -> Answer:
    began = time.perf_counter()
    session = opened(task)
    seconds = time.perf_counter() - began
    work = {"prefill": prefill, "decode": decode}
    rates = [work[cell["kind"]](session, cell) for cell in task["cells"]]
    return {"rates": rates, "open_s": seconds, "peak_bytes": peak_bytes(), **session.about()}


def logits(opened: Callable[[dict[str, Any]], Session], task: dict[str, Any]) -> Answer:
    """Logits after each call of tokens appended to one sequence."""
    session = opened(task)
    session.start(1, sum(map(len, task["calls"])))
    rows = [session.forward(np.asarray([call]))[0, -1].tolist() for call in task["calls"]]
    return {"logits": rows, **session.about()}


def peak_bytes() -> int:
    """High-water resident set of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def answer(opened: Callable[[dict[str, Any]], Session], build: Callable[[dict[str, Any]], Answer]) -> None:
    """Does the task of the command line; prints one JSON object on the last line."""
    task = json.loads(sys.argv[1])
    found = build(task) if task["do"] == "build" else {"bench": bench, "logits": logits}[task["do"]](opened, task)
    print(json.dumps(found))
