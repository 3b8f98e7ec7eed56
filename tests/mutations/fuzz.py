"""Damaged model files through the real loader: a working model, or an InputError; no crash, hang or other error.

    python tests/mutations/fuzz.py [--kind gguf] [--count 1000] [--seed 0] [--keep FOLDER]

Each mutant is decided by its kind and number. Workers open them one after another, with limits of time and memory,
and run a few tokens through what opens; one that crashes or hangs is counted and the rest go on in a new worker.
With --keep, the mutants that found a fault stay there. TRILEMMA_FUZZ_PRELOAD is put into LD_PRELOAD of the workers,
for a module that was built with sanitizers.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import mutate
import numpy as np

KINDS = ("gguf", "safetensors", "artifact")
LIMIT_S = 20.0  # of one mutant; a loaded machine is slow, a hang lasts
MEMORY = 3 << 30  # of address space beyond what the imports take
_FILES = {
    "safetensors": ("model.safetensors", "model.safetensors", "config.json"),
    "artifact": ("model.safetensors", "trilemma.json", "trilemma.json"),
}


def make_mutant(kind: str, number: int, seed: int, samples: list[Path], place: Path) -> Path:
    """Write mutant `number` and return what to open."""
    rng = random.Random(f"{seed}/{kind}/{number}")
    sample = rng.choice(samples)
    if kind == "gguf":
        raw = sample.read_bytes()
        knows = rng.random() < 0.5
        made = place / "mutant.gguf"
        made.write_bytes(mutate.gguf(raw, rng) if knows else mutate.blind(raw, rng, header=len(raw) // 8))
        return made
    made = place / "mutant"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(sample, made)
    for _ in range(rng.choice((1, 1, 1, 2))):
        file = made / rng.choice(_FILES[kind])
        raw = file.read_bytes()
        if rng.random() < 0.4:
            file.write_bytes(mutate.blind(raw, rng, header=3000))
        else:
            with_tree = mutate.json_text if file.suffix == ".json" else mutate.safetensors
            try:
                file.write_bytes(with_tree(raw, rng))
            except (ValueError, IndexError, RecursionError):  # it was damaged before
                file.write_bytes(mutate.blind(raw, rng, header=3000))
    return made


def open_and_run(path: Path, number: int) -> str:
    """What became of a mutant; any exception but an InputError is a fault."""
    from trilemma.core.errors import InputError
    from trilemma.formats.artifact import load_any
    from trilemma.model.tokenizer import Tokenizer
    from trilemma.runtime.engine import EngineOptions
    from trilemma.runtime.native import NativeEngine

    try:
        model = load_any(path)
        context = min(16, model.config.max_context)
        options = EngineOptions(
            threads=1 + number % 2, max_context=context, load=("copy", "map")[number // 2 % 2],
            verify=(None, True, False)[number // 4 % 3],
        )  # fmt: skip
        engine = NativeEngine(model, options)
        logits = engine.logits(np.arange(min(3, context)) % model.config.vocab_size)
        assert logits.shape[1] == model.config.vocab_size
        outcome = "runs" if math.isfinite(float(logits.sum())) else "runs, values are no numbers"
    except InputError as error:
        return _checked(error)
    with contextlib.suppress(InputError):  # most samples have no vocabulary
        if path.suffix == ".gguf":
            Tokenizer.load(path).encode("A cat sat.")
    return outcome


def _checked(error: Exception) -> str:
    if not 10 < len(str(error)) < 5000:
        raise AssertionError(f"a message of {len(str(error))} letters") from None
    return type(error).__name__


def work(task: dict[str, object]) -> None:
    """A worker: opens mutants `first`..`last` and prints a line of JSON after each."""
    place = Path(str(task["place"]))
    samples = [Path(sample) for sample in task["samples"]]  # type: ignore[attr-defined]
    import trilemma.formats.artifact
    import trilemma.formats.gguf.read
    import trilemma.runtime.native  # noqa: F401

    if not os.environ.get("LD_PRELOAD"):  # sanitizers reserve terabytes
        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    for number in range(int(task["first"]), int(task["last"])):  # type: ignore[call-overload]
        path = make_mutant(str(task["kind"]), number, int(task["seed"]), samples, place)  # type: ignore[call-overload]
        print(json.dumps({"begin": number}), flush=True)
        began, fault = time.perf_counter(), ""
        try:
            outcome = open_and_run(path, number)
        except Exception as error:
            outcome = f"FAULT {type(error).__name__}"
            fault = "".join(traceback.format_exception(error)[-4:])
        seconds = time.perf_counter() - began
        print(json.dumps({"end": number, "outcome": outcome, "fault": fault, "s": seconds}), flush=True)


def run(
    kind: str, count: int, seed: int, folder: Path, keep: Path | None = None
) -> tuple[collections.Counter[str], list[str]]:
    """Outcomes with how often they came, and what was wrong."""
    import samples

    place = folder / kind
    place.mkdir(parents=True)
    made = [str(path) for path in samples.MAKERS[kind](folder)]
    outcomes: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    first = 0
    while first < count:
        task = {"kind": kind, "first": first, "last": count, "seed": seed, "samples": made, "place": str(place)}
        first = count
        for number, outcome, fault in _watch(task):
            outcomes[outcome] += 1
            if not outcome.startswith(("FAULT", "CRASH", "HANG")):
                continue
            faults.append(f"{kind} {number}: {outcome} {fault}")
            if keep is not None:
                again = folder / "again"  # the worker is busy with the next one in its place
                again.mkdir(exist_ok=True)
                path = make_mutant(kind, number, seed, [Path(sample) for sample in made], again)
                target = keep / f"{kind}-{number}{path.suffix}"
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)
            if not outcome.startswith("FAULT"):  # the worker is gone
                first = number + 1
    return outcomes, faults


def _watch(task: dict[str, object]) -> Iterator[tuple[int, str, str]]:
    environment = dict(os.environ)
    if os.environ.get("TRILEMMA_FUZZ_PRELOAD"):
        environment |= {"LD_PRELOAD": os.environ["TRILEMMA_FUZZ_PRELOAD"], "PYTHONMALLOC": "malloc"}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(task)]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as worker,
    ):
        assert worker.stdout is not None
        current, pending = int(str(task["first"])), b""
        while True:
            limit = LIMIT_S * (10 if "LD_PRELOAD" in environment else 1)
            if not select.select([worker.stdout], [], [], limit)[0]:
                worker.kill()
                yield current, "HANG", ""
                return
            part = os.read(worker.stdout.fileno(), 1 << 16)
            if not part:
                break
            *lines, pending = (pending + part).split(b"\n")
            for line in map(json.loads, lines):
                if "begin" in line:
                    current = line["begin"]
                else:
                    slow = line["s"] > LIMIT_S and not line["outcome"].startswith("FAULT")
                    yield current, "FAULT slow" if slow else line["outcome"], line["fault"]
                    current += 1
        if worker.wait() != 0:
            errors.seek(0)
            yield current, f"CRASH {worker.returncode}", errors.read()[-3000:].decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--count", type=int, default=1000, help="mutants of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for mutants that found a fault")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return 0
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for kind in options.kind or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            outcomes, faults = run(kind, options.count, options.seed, Path(folder), options.keep)
        print(f"{kind}: " + ", ".join(f"{count} {name}" for name, count in outcomes.most_common()), flush=True)
        wrong += len(faults)
        for fault in faults:
            print(fault, flush=True)
    print(f"{wrong} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
