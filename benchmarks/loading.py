"""Opening to the first token, ours beside llama.cpp's: the same weights, warm and cold page cache, fresh processes.

    python benchmarks/loading.py examples/shapes/Llama-3.2-1B --rounds 5 --llama-python PYTHON [--folder KEPT]

Each round starts every way of opening once, in a turning order. 'open' is from a process whose imports are done to
the first token of a short prompt; 'process' is from its start, imports included. A cold file is written back and its
pages are dropped before the process starts (posix_fadvise; no privilege is needed). What was resident at most stands
beside, and the rate of decode that follows, which huge pages and file pages serve differently.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHAPES = HERE.parent / "examples" / "shapes"
WORKER = HERE.parent / "src" / "trilemma" / "runtime" / "llama_cpp_worker.py"
HEADERS = ("what", "cache", "open s", "process s", "peak MB", "decode tokens/s")


def ours(task: dict[str, Any]) -> None:
    from trilemma.formats.artifact import load_any
    from trilemma.measure.memory.peak_process import peak_resident_bytes
    from trilemma.runtime import SamplingSettings, open_engine
    from trilemma.runtime.engine import EngineOptions

    ready = time.perf_counter()
    settings = {name: task[name] for name in ("load", "verify") if name in task}
    options = EngineOptions(threads=task["threads"], max_context=640, **settings)
    model = load_any(task["path"])
    loaded = time.perf_counter()
    engine = open_engine(model, options=options)
    opened = time.perf_counter()
    engine.generate(task["prompt"], SamplingSettings(max_tokens=1, ignore_eos=True))
    first = time.perf_counter()
    going_on = SamplingSettings(max_tokens=task["decode"] + 1, ignore_eos=True)
    times = engine.generate(task["prompt"], going_on).token_times_s
    memory = engine.memory()
    _tell(ready, first, task["decode"] / (times[-1] - times[0]), peak_resident_bytes(),
          headers_s=loaded - ready, weights_s=opened - loaded, engine_bytes=memory.total_bytes,
          weights_bytes=memory.weights_bytes, kv_bytes=memory.kv_bytes)  # fmt: skip


def llama_cpp(task: dict[str, Any]) -> None:
    import numpy as np

    # By its place: beside it lies a llama_cpp.py of ours, which must not be found as the package.
    spec = importlib.util.spec_from_file_location("llama_cpp_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    library = worker.load_library()
    worker.load_library = lambda: library
    ready = time.perf_counter()
    engine = worker.LlamaCpp(
        {"path": task["path"], "context": 640, "threads": task["threads"], "kv_type": 30, "flash": True}
    )
    prompt = np.array(task["prompt"], np.int32)
    token = engine.next_token(prompt)
    first = time.perf_counter()
    for _ in range(task["decode"]):
        token = engine.next_token(np.array([token], np.int32))
    _tell(ready, first, task["decode"] / (time.perf_counter() - first), worker.peak_bytes())


def _tell(ready: float, first: float, rate: float, peak: int, **more: float) -> None:
    print(json.dumps({"open_s": first - ready, "first": time.time() - (time.perf_counter() - first),
                      "decode": rate, "peak_bytes": peak, **more}))  # fmt: skip


def cool(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm(path: Path) -> None:
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def measure(way: dict[str, Any], *, cold: bool, options: argparse.Namespace) -> dict[str, float]:
    task = {"threads": options.threads, "decode": options.decode, "prompt": list(range(10, 26)), **way}
    (cool if cold else warm)(Path(way["path"]))
    began = time.time()
    command = [way["python"], str(Path(__file__).resolve()), "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise SystemExit(f"{way['name']} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "process_s": found["first"] - began}


def ways(options: argparse.Namespace, artifact: Path, gguf: Path) -> Iterator[dict[str, Any]]:
    here = {"python": sys.executable, "do": "ours"}
    yield {**here, "name": "artifact, copy", "path": str(artifact), "load": "copy"}
    yield {**here, "name": "artifact, copy, not verified", "path": str(artifact), "load": "copy", "verify": False}
    yield {**here, "name": "artifact, map", "path": str(artifact), "load": "map"}
    yield {**here, "name": "GGUF", "path": str(gguf)}
    if options.llama_python:
        yield {"python": options.llama_python, "do": "llama_cpp", "name": "llama.cpp, GGUF", "path": str(gguf)}


def build(source: Path, storage: str, folder: Path) -> tuple[Path, Path]:
    """The artifact and the GGUF file of it; what is there already is kept."""
    from peers.build import write_model

    from trilemma.export.gguf import export_gguf
    from trilemma.formats.artifact import load_any

    artifact, gguf = folder / f"{source.name}-{storage}", folder / f"{source.name}-{storage}.gguf"
    if not artifact.exists():
        write_model(source, storage, artifact)
    if not gguf.exists():
        export_gguf(load_any(artifact), gguf)
    return artifact, gguf


def run(options: argparse.Namespace, folder: Path) -> None:
    every = list(ways(options, *build(options.model, options.format, folder)))
    if options.only:
        every = [way for way in every if way["name"] in options.only]
    states = [False, True] if not options.warm else [False]
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for turn in range(options.rounds):
        for cold in states:
            for way in [*every[turn % len(every) :], *every[: turn % len(every)]]:
                result = measure(way, cold=cold, options=options)
                found.setdefault((way["name"], cold), []).append(result)
                if options.json:
                    with options.json.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps({"way": way["name"], "cold": cold, "round": turn, **result}) + "\n")
    print(f"| {' | '.join(HEADERS)} |\n|{'---|' * len(HEADERS)}")
    for way in every:
        for cold in states:
            runs = found[way["name"], cold]
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            state = "cold" if cold else "warm"
            print(f"| {way['name']} | {state} | {middle['open_s']:.3f} | {middle['process_s']:.3f} | "
                  f"{middle['peak_bytes'] / 1e6:.0f} | {middle['decode']:.1f} |")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("model", type=Path, nargs="?", default=SHAPES / "Llama-3.2-1B")
    parser.add_argument("--format", default="int4-g32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--decode", type=int, default=16, help="tokens decoded after the first")
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python and numpy")
    parser.add_argument("--folder", type=Path, help="keep the model here; by default it is made anew")
    parser.add_argument("--warm", action="store_true", help="leave the cold cache out")
    parser.add_argument("--only", action="append", help="one of the ways, by its name in the table; repeatable")
    parser.add_argument("--json", type=Path, help="append each run to this file")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        {"ours": ours, "llama_cpp": llama_cpp}[options.worker["do"]](options.worker)
        return 0
    from trilemma.core.errors import TrilemmaError  # not above: a peer's interpreter has no such package

    try:
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
            run(options, options.folder)
        else:
            with tempfile.TemporaryDirectory() as temporary:
                run(options, Path(temporary))
    except TrilemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
