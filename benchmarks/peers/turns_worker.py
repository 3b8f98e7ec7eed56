"""One variant of our engine for builds.py: opens the model, then does its work once for every line of its input.

    python turns_worker.py '{"library": "installed", "isa": null, "kv": "bf16", "threads": "2", "model": ARTIFACT,
                             "kind": "prefill", "count": 512}'

Prints a JSON object when it is ready, then seconds, a line each.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any

NAME = "trilemma._native"


def use_library(path: str) -> None:
    """Let the file stand for the installed extension, before anything imports that."""
    loader = ExtensionFileLoader(NAME, path)
    spec = spec_from_loader(NAME, loader)
    assert spec is not None  # a loader was given
    module = sys.modules[NAME] = module_from_spec(spec)
    loader.exec_module(module)
    importlib.import_module("trilemma")._native = module  # type: ignore[attr-defined]


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    if task["isa"]:
        os.environ["TRILEMMA_ISA"] = task["isa"]
    if task["library"] != "installed":
        use_library(task["library"])
    errors = importlib.import_module("trilemma.core.errors")  # only now: both of these import the extension
    try:
        work, isa = importlib.import_module("turns_work").open_work(task)
    except errors.TrilemmaError as error:
        sys.exit(f"error: {error}")
    work()
    print(json.dumps({"isa": isa}), flush=True)
    for _ in sys.stdin:
        print(min(work() for _ in range(2)), flush=True)


if __name__ == "__main__":
    main()
