"""`trilemma compress` killed with kill -9 at ten moments, then called again: the bytes must be those of a whole run.

    python benchmarks/compress_resume.py [--model examples/models/hearth-7m] [--scheme W4A8-g32-guided] [--kills 10]

Moments are spread over the run's progress, each with a random delay behind it, so that some fall into computing and
some into writing. Exits with 1 when a file differs.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

HEARTH = Path(__file__).resolve().parent.parent / "examples" / "models" / "hearth-7m"
MOST_DELAY_S = 0.5


def main() -> int:
    options = read_options()
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        words: list[str] = []
        compress(options, folder / "whole", lambda done, total, what: words.append(what))
        wanted = digests(folder / "whole")
        different = 0
        for moment in np.linspace(1, len(words) - 1, options.kills).round().astype(int):
            output, delay = folder / "killed", float(rng.uniform(0, MOST_DELAY_S))
            process = multiprocessing.get_context("spawn").Process(target=killed, args=(options, output, moment, delay))
            process.start()
            process.join()
            again: list[str] = []
            if process.exitcode == -signal.SIGKILL and not output.exists():  # it may have been done just before
                compress(options, output, lambda done, total, what, again=again: again.append(what))  # type: ignore[misc]
            same = digests(output) == wanted
            different += not same
            print(
                f"'{words[moment - 1]}' + {delay:.2f} s: {'killed' if again else 'was done before'}, "
                f"{len(again)} of {len(words)} steps again, {'the same bytes' if same else 'OTHER BYTES'}", flush=True,
            )  # fmt: skip
            shutil.rmtree(output)
    print(f"{options.scheme} of {options.model.name}: {options.kills - different} of {options.kills} the same")
    return int(different > 0)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HEARTH)
    parser.add_argument("--scheme", default="W4A8-g32-guided")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def compress(options: argparse.Namespace, output: Path, progress: Callable[[int, int, str], None]) -> None:
    import trilemma

    tokens = np.random.default_rng(1).integers(0, 8192, (options.windows, 128)).astype(np.int32)
    trilemma.compress(
        options.model, output, scheme=options.scheme, calibration=tokens, threads=options.threads, progress=progress
    )


def killed(options: argparse.Namespace, output: Path, moment: int, delay_s: float) -> None:
    said = 0

    def tell(done: int, total: int, what: str) -> None:
        nonlocal said
        said += 1
        if said == moment:
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

    compress(options, output, tell)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    sys.exit(main())
