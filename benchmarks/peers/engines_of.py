"""How each engine is run: its files, its ways to be set up, and one fresh process a group of cells.

`ENGINES` maps names to functions (setup, files, storage, group, way) -> what the process found: "rates" has a list of
tokens a second for each cell. What there is to choose in a way is in `ways.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.cells import BATCH_DEPTH, Cell, Group

HERE = Path(__file__).resolve().parent
KV = {"16": {"ours": "bf16", "llama.cpp": "f16", "openvino": "f16"},
      "8": {"ours": "int8", "llama.cpp": "q8_0", "openvino": "u8"},
      "4": {"ours": "int4", "llama.cpp": "q4_0", "openvino": "u4"}}  # fmt: skip
GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0")
A16 = "-a16"  # behind a format: our inputs are bf16, not int8; the peers' files are the same
OPENED_CONTEXT = 640  # 512 tokens and 128 more
TRIES = 3
TIMEOUT_S = 3600.0  # of one process
Found = dict[str, Any]
Way = Mapping[str, Any]


@dataclass(frozen=True)
class Setup:
    """Where the peers are, and what holds for all of them. A peer without a place is left out."""

    threads: int = 2
    kv: str = "16"
    llama_bench: str | None = None
    pythons: Mapping[str, str] = field(default_factory=dict)  # of openvino and onnxruntime

    def present(self, storage: str = "int4-g32") -> list[str]:
        """Engines that are there and can hold the format; the graphs are made for grids of our own alone."""
        there = ["ours", *(["llama.cpp"] if self.llama_bench else [])]
        if not storage.startswith("int"):
            return there
        there += [name for name in ("openvino", "onnxruntime") if self.pythons.get(name)]
        return there if self.kv == "16" else [name for name in there if name != "onnxruntime"]  # its caches are f32


@dataclass(frozen=True)
class Files:
    """One model in one format for every engine: the same codes and scales everywhere."""

    artifact: Path
    gguf: Path
    dump: Path
    built: Mapping[str, Path]  # graphs of openvino ('openvino-i4', ...) and onnxruntime


class EngineFailedError(RuntimeError):
    """A process ended badly; the message has its last words."""


def ours(setup: Setup, files: Files, storage: str, group: Group, way: Way) -> Found:
    if group.cells[0].kind == "open":
        return _opened("ours", files.artifact, setup, group)
    task = {"model": str(files.artifact), "threads": setup.threads, "kv": KV[setup.kv]["ours"],
            "cells": [{**cell.task(), "context": cell.context} for cell in group.cells]}  # fmt: skip
    return run_worker(sys.executable, "ours", task)


def llama_cpp(setup: Setup, files: Files, storage: str, group: Group, way: Way) -> Found:
    """Its own llama-bench, which fills a cache once and restores it; batches by llama-batched-bench beside it."""
    bench, kv = str(setup.llama_bench), KV[setup.kv]["llama.cpp"]
    if group.cells[0].kind == "open":
        return _opened("llama.cpp", files.gguf, setup, group)
    if group.cells[0].batch > 1:
        return _batched(setup, files, group.cells[0], way)
    cells = group.cells
    what: list[str] = ["-p", "0", "-n", str(cells[0].tokens), "-d", _joined(cell.depth for cell in cells)]
    if cells[0].kind == "prefill":
        what = ["-p", _joined(cell.tokens for cell in cells), "-n", "0"]
    command = [bench, "-m", str(files.gguf), *what, "-t", str(setup.threads), "-r", str(cells[0].repeats), "-fa",
               way["flash"], "--repack", str(way["repack"]), "-lm", way["load"], "-ub", str(way["ubatch"]),
               "-ctk", kv, "-ctv", kv, "-o", "json"]  # fmt: skip
    rows = json.loads(_output(command, "llama.cpp"))
    rates = {(row["n_prompt"], row["n_depth"]): row["samples_ts"] for row in rows}
    keys = [(cell.tokens, 0) if cell.kind == "prefill" else (0, cell.depth) for cell in cells]
    return {"rates": [rates[key] for key in keys], "version": str(rows[0]["build_commit"])}


def _opened(engine: str, model: Path, setup: Setup, group: Group) -> Found:
    """A process a cell: nothing may be open already."""
    task = {"engine": engine, "model": str(model.resolve()), "threads": setup.threads, "context": OPENED_CONTEXT}
    found = [
        run_worker(sys.executable, "opening", {**task, "prompt": cell.tokens, "cold": cell.cold})
        for cell in group.cells
    ]
    return {"rates": [one["rates"] for one in found], "version": found[0]["version"]}


def _batched(setup: Setup, files: Files, cell: Cell, way: Way) -> Found:
    """One process: a batch to warm up, one a repeat, one more: its log is written by a thread that may lose the end."""
    tool, kv = Path(str(setup.llama_bench)).with_name("llama-batched-bench"), KV[setup.kv]["llama.cpp"]
    if not tool.is_file():
        raise EngineFailedError(f"there is no '{tool.name}' beside llama-bench: build it for batches")
    room = (BATCH_DEPTH + cell.tokens + 8) * cell.batch
    command = [str(tool), "-m", str(files.gguf), "-c", str(room), "-npp", str(BATCH_DEPTH), "-ntg", str(cell.tokens),
               "-npl", _joined([cell.batch] * (cell.repeats + 2)), "-t", str(setup.threads), "-tb", str(setup.threads),
               "-fa", way["flash"], "-lm", way["load"], "-ub", str(way["ubatch"]),
               "-ctk", kv, "-ctv", kv, "--output-format", "jsonl"]  # fmt: skip
    command += [] if way["repack"] else ["--no-repack"]
    for _ in range(TRIES):
        lines = [line for line in _output(command, "llama.cpp").splitlines() if line.startswith("{")]
        rates = [float(json.loads(line)["speed_tg"]) for line in lines][1 : cell.repeats + 1]
        if rates:
            return {"rates": [rates], "version": tool.name}
    raise EngineFailedError(f"{tool.name} printed no figures in {TRIES} tries")


def openvino(setup: Setup, files: Files, storage: str, group: Group, way: Way) -> Found:
    task = {"do": "bench", "model": str(files.built[f"openvino-{way['weights']}"]), "threads": setup.threads,
            "hint": way["hint"], "kv": way["kv"] or KV[setup.kv]["openvino"], "dynamic": way["dynamic"],
            "cells": [cell.task() for cell in group.cells]}  # fmt: skip
    return run_worker(setup.pythons["openvino"], "openvino", task)


def onnxruntime(setup: Setup, files: Files, storage: str, group: Group, way: Way) -> Found:
    task = {"do": "bench", "model": str(files.built["onnxruntime"]), "threads": setup.threads,
            "cells": [cell.task() for cell in group.cells]}  # fmt: skip
    return run_worker(setup.pythons["onnxruntime"], "onnxruntime", task)


ENGINES: dict[str, Callable[[Setup, Files, str, Group, Way], Found]] = {
    "ours": ours, "llama.cpp": llama_cpp, "openvino": openvino, "onnxruntime": onnxruntime,
}  # fmt: skip


def run_worker(python: str, kind: str, task: Mapping[str, Any]) -> Found:
    """Ask a worker's script in a fresh process.

    Raises:
        EngineFailedError: it failed; the message has its last words.
    """
    found: Found = json.loads(
        _output([python, str(HERE / f"{kind}_worker.py"), json.dumps(task)], kind).splitlines()[-1]
    )
    return found


def _output(command: list[str], engine: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise EngineFailedError(f"{engine} was stopped after {TIMEOUT_S:g} s") from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[-400:]
        raise EngineFailedError(f"{engine} ended with {done.returncode}: {words}")
    return done.stdout


def _joined(values: Sequence[int] | Any) -> str:
    return ",".join(str(value) for value in values)


__all__ = ["ENGINES", "GGUF_TYPES", "KV", "EngineFailedError", "Files", "Setup", "run_worker"]
