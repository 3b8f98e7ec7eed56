"""From a file to the first token in a fresh process: ours, or llama.cpp in the Python that TRILEMMA_LLAMA_CPP names.

python opening_worker.py '{"engine": "llama.cpp", "model": FILE, "threads": 2, "prompt": 16, "cold": true}'

Libraries are loaded before the clock starts. With "cold" the model's files are first dropped from the page cache (of
Linux; pages that others map stay). Prints one JSON object on its last line: how many times a second it could be done.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions
from trilemma.runtime.llama_cpp_process import WorkerProcess
from trilemma.runtime.native import NativeEngine

F16 = 1  # llama.cpp's number for its default cache


def ours(task: dict[str, Any], ids: np.ndarray) -> float:
    began = time.perf_counter()
    engine = open_engine(task["model"], options=EngineOptions(threads=task["threads"], max_context=task["context"]))
    engine.logits(ids, last_only=True)
    seconds = time.perf_counter() - began
    if not isinstance(engine, NativeEngine):
        raise TypeError("benchmarks/engines.py measures the native engine")
    return seconds


def llama_cpp(task: dict[str, Any], ids: np.ndarray) -> float:
    """Its own process, asked over pipes; the answer is one row of logits."""
    worker = WorkerProcess()
    worker.ask({"do": "peak"})  # loads the library
    began = time.perf_counter()
    worker.ask({"do": "open", "path": task["model"], "context": task["context"], "threads": task["threads"],
                "kv_type": F16, "flash": True})  # fmt: skip
    worker.ask({"do": "logits", "fresh": True, "every": False}, ids.view(np.uint8).data)
    seconds = time.perf_counter() - began
    worker.close()
    return seconds


def forget(model: Path) -> None:
    """Drop the files from the page cache."""
    for path in model.rglob("*") if model.is_dir() else [model]:
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(model: Path) -> None:
    """Read the files once."""
    for path in model.rglob("*") if model.is_dir() else [model]:
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def main() -> None:
    task = json.loads(sys.argv[1])
    ids = np.arange(3, 3 + task["prompt"], dtype=np.int32)
    (forget if task["cold"] else warm)(Path(task["model"]))
    seconds = {"ours": ours, "llama.cpp": llama_cpp}[task["engine"]](task, ids)
    print(json.dumps({"rates": [1 / seconds], "version": task["engine"]}))


if __name__ == "__main__":
    main()
