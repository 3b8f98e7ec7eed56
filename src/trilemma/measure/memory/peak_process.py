"""The fresh process behind `memory.peak_memory`: open, prefill, decode, read the high-water mark.

Run as `python -m trilemma.measure.memory.peak_process TASK`; TASK is JSON. Without a path it only
imports what a run imports: the process with nothing opened. Prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def peak_resident_bytes(status: Path = Path("/proc/self/status")) -> int:
    """VmHWM of this process; the kernel's rusage where there is no /proc."""
    try:
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(argument: str) -> None:
    task: dict[str, Any] = json.loads(argument)
    import numpy as np

    from trilemma.runtime import ENGINES, open_engine
    from trilemma.runtime.engine import EngineOptions, SamplingSettings

    kind: Any = ENGINES.get(task["runtime"])
    peak = getattr(kind, "empty_peak_bytes", peak_resident_bytes)  # of an engine with a process of its own
    from trilemma.formats import artifact  # noqa: F401 - what opening a folder imports
    from trilemma.model import checkpoint  # noqa: F401

    found: dict[str, Any] = {}
    if "path" in task:
        began = time.perf_counter()
        options = EngineOptions.model_validate(task["options"])
        engine = open_engine(task["path"], runtime=task["runtime"], options=options)
        found["open_s"] = time.perf_counter() - began
        prompt = np.random.default_rng(0).integers(0, engine.config.vocab_size, task["prompt_tokens"])
        engine.generate(
            [int(token) for token in prompt], SamplingSettings(max_tokens=task["output_tokens"], ignore_eos=True)
        )
        found |= {"threads": engine.threads, "kv_cache": engine.kv_cache, "context": engine.max_context,
                  "engine_memory_bytes": engine.memory().total_bytes}  # fmt: skip
        peak = getattr(engine, "peak_resident_bytes", peak_resident_bytes)
    found["peak_bytes"] = peak()
    print(json.dumps(found))


if __name__ == "__main__":
    from trilemma.core.errors import TrilemmaError

    try:
        main(sys.argv[1])
    except TrilemmaError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
