"""Memory and disk: what the engine counts itself, and what a fresh process really held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from trilemma.core.errors import EngineError, InputError
from trilemma.core.measurement import Measurement
from trilemma.model.cost import kv_bytes_per_token
from trilemma.runtime.engine import Engine, EngineMemory, EngineOptions

PROCESS_LIMIT_S = 600.0


def engine_memory(engine: Engine) -> dict[str, Measurement]:
    """weights_bytes, engine_memory_bytes and kv_bytes_per_token, exact, at the engine's context.

    The total is weights + KV cache (whole blocks, reserved in full) + scratch; its parts stand in the conditions.
    kv_bytes_per_token is by arithmetic: what one more position needs.
    """
    conditions: dict[str, str | int | float] = {
        "context": engine.max_context, "kv_cache": engine.kv_cache, "threads": engine.threads, "isa": engine.isa,
    }  # fmt: skip
    return memory_measurements(engine, engine.memory(), conditions)


def memory_measurements(
    engine: Engine, held: EngineMemory, conditions: dict[str, str | int | float]
) -> dict[str, Measurement]:
    """The same three figures of what is held, by the engine or by sequences opened over it."""
    stated = {
        **conditions, "weights_bytes": held.weights_bytes, "kv_bytes": held.kv_bytes,
        "scratch_bytes": held.scratch_bytes,
    }  # fmt: skip
    how = getattr(engine, "memory_method", "")  # of an engine that relies on another's account
    method = f"counted by the engine '{engine.name}'" + (f": {how}" if how else "")
    values = {
        "weights_bytes": held.weights_bytes,
        "engine_memory_bytes": held.total_bytes,
        "kv_bytes_per_token": kv_bytes_per_token(engine.config, engine.kv_cache),
    }
    return {
        metric: Measurement.of(metric, value, method=method, ci95=(value, value), conditions=stated)
        for metric, value in values.items()
    }


def artifact_bytes(path: str | Path) -> Measurement:
    """Bytes of all files in a folder (or of one file) on disk.

    Raises:
        InputError: there is nothing.
    """
    root = Path(path)
    if not root.exists():
        raise InputError(f"'{root}' does not exist; there is nothing to weigh.")
    files = [root] if root.is_file() else [item for item in root.rglob("*") if item.is_file()]
    total = sum(item.stat().st_size for item in files)
    return Measurement.of(
        "artifact_bytes", total, method="sum of file sizes", ci95=(total, total), conditions={"files": len(files)}
    )


def peak_memory(
    path: str | Path,
    *,
    prompt_tokens: int,
    output_tokens: int,
    runtime: str = "native",
    options: EngineOptions | None = None,
) -> Measurement:
    """High-water resident set of a fresh process that opens, prefills and decodes.

    Args:
        path: a checkpoint folder, an artifact or a bare config.json.
        prompt_tokens, output_tokens: lengths of the one request.
        runtime, options: how it is opened; without a context in them, with one for exactly these lengths.

    Returns:
        peak_memory_bytes; the same process with nothing opened stands in the conditions.

    Raises:
        EngineError: the process failed; the message carries its last line.
    """
    settings = options or EngineOptions()
    if settings.max_context is None:
        settings = settings.model_copy(update={"max_context": prompt_tokens + output_tokens})
    task = {
        "path": str(path), "runtime": runtime, "options": settings.model_dump(mode="json"),
        "prompt_tokens": prompt_tokens, "output_tokens": output_tokens,
    }  # fmt: skip
    empty_bytes = empty_process_bytes(runtime)
    held = _run_process(task)
    peak = float(held["peak_bytes"])
    return Measurement.of(
        "peak_memory_bytes",
        peak,
        method="VmHWM of a fresh process: open, prefill, decode",
        ci95=(peak, peak),
        conditions={
            "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "runtime": runtime,
            "empty_process_bytes": empty_bytes, "above_empty_bytes": int(peak) - empty_bytes,
            "threads": held["threads"], "kv_cache": held["kv_cache"], "context": held["context"],
            "open_s": held["open_s"], "engine_memory_bytes": held["engine_memory_bytes"],
        },
    )  # fmt: skip


@cache
def empty_process_bytes(runtime: str) -> int:
    """High-water resident set of a process that imports what a run imports and opens nothing; measured once.

    Raises:
        EngineError: the process failed.
    """
    return int(_run_process({"runtime": runtime})["peak_bytes"])


def _run_process(task: dict[str, object]) -> dict[str, int | float | str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-m", "trilemma.measure.memory.peak_process", json.dumps(task)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=PROCESS_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"The process that measures peak memory took longer than {PROCESS_LIMIT_S:.0f} s. Ask for fewer tokens."
        ) from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode} (killed for memory?)"]
        raise EngineError(f"The process that measures peak memory failed: {lines[-1]}")
    found: dict[str, int | float | str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
