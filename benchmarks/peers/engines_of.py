"""How each engine is run: its files, its ways to be set up, and one fresh process a group of cells.

`ENGINES` maps names to functions (setup, files, storage, group, way) -> what the process found: "rates" has a list of
tokens a second for each cell. `WAYS` lists the set-ups of a peer that are tried before its best is taken.
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
      "8": {"ours": "int8", "llama.cpp": "q8_0", "openvino": "u8"}}  # fmt: skip
Found = dict[str, Any]
Way = Mapping[str, Any]


@dataclass(frozen=True)
class Setup:
    """Where the peers are, and what holds for all of them. A peer without a place is left out."""

    threads: int = 2
    kv: str = "16"
    llama_bench: str | None = None
    pythons: Mapping[str, str] = field(default_factory=dict)  # of openvino and onnxruntime

    def present(self) -> list[str]:
        there = ["ours", *(["llama.cpp"] if self.llama_bench else [])]
        return there + [name for name in ("openvino", "onnxruntime") if self.pythons.get(name)]


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
    task = {"model": str(files.artifact), "threads": setup.threads, "kv": KV[setup.kv]["ours"],
            "cells": [{**cell.task(), "context": cell.context} for cell in group.cells]}  # fmt: skip
    return run_worker(sys.executable, "ours", task)


def llama_cpp(setup: Setup, files: Files, storage: str, group: Group, way: Way) -> Found:
    """Its own llama-bench; batches by llama-batched-bench beside it."""
    bench, kv = str(setup.llama_bench), KV[setup.kv]["llama.cpp"]
    if group.cells[0].batch > 1:
        return _batched(setup, files, group.cells[0], way)
    cells = group.cells
    what: list[str] = ["-p", "0", "-n", str(cells[0].tokens), "-d", _joined(cell.depth for cell in cells)]
    if cells[0].kind == "prefill":
        what = ["-p", _joined(cell.tokens for cell in cells), "-n", "0"]
    command = [bench, "-m", str(files.gguf), *what, "-t", str(setup.threads), "-r", str(cells[0].repeats), "-fa",
               way["flash"], "--repack", str(way["repack"]), "-ctk", kv, "-ctv", kv, "-o", "json"]  # fmt: skip
    rows = json.loads(_output(command, "llama.cpp"))
    rates = {(row["n_prompt"], row["n_depth"]): row["samples_ts"] for row in rows}
    keys = [(cell.tokens, 0) if cell.kind == "prefill" else (0, cell.depth) for cell in cells]
    return {"rates": [rates[key] for key in keys], "version": str(rows[0]["build_commit"])}


def _batched(setup: Setup, files: Files, cell: Cell, way: Way) -> Found:
    tool, kv = Path(str(setup.llama_bench)).with_name("llama-batched-bench"), KV[setup.kv]["llama.cpp"]
    if not tool.is_file():
        raise EngineFailedError(f"there is no '{tool.name}' beside llama-bench: build it for batches")
    room = (BATCH_DEPTH + cell.tokens + 8) * cell.batch
    command = [str(tool), "-m", str(files.gguf), "-c", str(room), "-npp", str(BATCH_DEPTH), "-ntg", str(cell.tokens),
               "-npl", str(cell.batch), "-t", str(setup.threads), "-tb", str(setup.threads), "-fa", way["flash"],
               "-ctk", kv, "-ctv", kv, "--output-format", "jsonl"]  # fmt: skip
    command += [] if way["repack"] else ["--no-repack"]
    rates = []
    for _ in range(cell.repeats):
        lines = [line for line in _output(command, "llama.cpp").splitlines() if line.startswith("{")]
        rates.append(float(json.loads(lines[-1])["speed_tg"]))
    return {"rates": [rates], "version": tool.name}


def openvino(setup: Setup, files: Files, storage: str, group: Group, way: Way) -> Found:
    task = {"do": "bench", "model": str(files.built[f"openvino-{way['weights']}"]), "threads": setup.threads,
            "hint": way["hint"], "kv": KV[setup.kv]["openvino"], "dynamic": 32,
            "cells": [cell.task() for cell in group.cells]}  # fmt: skip
    return run_worker(setup.pythons["openvino"], "openvino", task)


def onnxruntime(setup: Setup, files: Files, storage: str, group: Group, way: Way) -> Found:
    if setup.kv != "16":
        raise EngineFailedError("its attention on the processor keeps f32 caches alone")
    task = {"do": "bench", "model": str(files.built["onnxruntime"]), "threads": setup.threads,
            "cells": [cell.task() for cell in group.cells]}  # fmt: skip
    return run_worker(setup.pythons["onnxruntime"], "onnxruntime", task)


ENGINES: dict[str, Callable[[Setup, Files, str, Group, Way], Found]] = {
    "ours": ours, "llama.cpp": llama_cpp, "openvino": openvino, "onnxruntime": onnxruntime,
}  # fmt: skip


def ways_of(engine: str, storage: str) -> list[dict[str, Any]]:
    """Set-ups of an engine worth trying; ours has one, its default."""
    if engine == "llama.cpp":
        return [{"flash": "on", "repack": 1}, {"flash": "off", "repack": 1}, {"flash": "on", "repack": 0}]
    if engine == "openvino":
        return [{"weights": kind, "hint": hint} for kind in weight_kinds(storage) for hint in ("f32", "bf16")]
    return [{}]


def weight_kinds(storage: str) -> list[str]:
    """How OpenVINO may hold the codes of a format."""
    return ["i4", "u4"] if storage.startswith("int4") else ["i8", "u8"]


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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[-400:]
        raise EngineFailedError(f"{engine} ended with {done.returncode}: {words}")
    return done.stdout


def _joined(values: Sequence[int] | Any) -> str:
    return ",".join(str(value) for value in values)


__all__ = ["ENGINES", "KV", "EngineFailedError", "Files", "Setup", "run_worker", "ways_of", "weight_kinds"]
