"""Builds and settings of our own engine against one another, by turns: what did a change to the kernels bring?

    python benchmarks/builds.py MODEL --what prefill:512 --rounds 9 before.so after.so
    python benchmarks/builds.py MODEL --what prefill:512 installed,kv=bf16 installed,kv=int8
    python benchmarks/builds.py MODEL --what products:16 installed installed,isa=avx512

Each variant is a library (a copy of `trilemma/_native*.so`, or `installed`) and settings behind it: `isa`, `kv`,
`threads`. Every one lives in a process of its own with the model opened; in each round each works once while the others
sleep, in a turning order, so that a drifting machine hits all alike. What is timed: `prefill:N` tokens, `decode:D` (a
token at depth D), `batch:N` (a step of N sequences at depth 128), `products:N` (the matrix products alone of all layers
for N tokens; for these the share of what `vpdpbusd` or its like can do is in `engines.py`). Times are the better of two
in a turn; ratios are paired within rounds. Exits 2 on a variant that does not start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from trilemma.core.errors import InputError, TrilemmaError

WORKER = Path(__file__).resolve().parent / "peers" / "turns_worker.py"
SETTINGS = {"isa": None, "kv": "bf16", "threads": "2"}
KINDS = ("prefill", "decode", "batch", "products")


class Variant:
    """A process that opens the model once and then does the work whenever it is told to."""

    def __init__(self, words: str, model: Path, kind: str, count: int) -> None:
        library, *pairs = words.split(",")
        given = dict(pair.partition("=")[::2] for pair in pairs)
        if unknown := given.keys() - SETTINGS.keys():
            raise InputError(f"'{words}': unknown {', '.join(sorted(unknown))}; choose of {', '.join(SETTINGS)}")
        if library != "installed" and not Path(library).is_file():
            raise InputError(f"'{library}' is no file; give a copy of trilemma/_native*.so, or 'installed'")
        self.words = words
        self.seconds: list[float] = []
        task = {**SETTINGS, **given, "library": library, "model": str(model), "kind": kind, "count": count}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about: dict[str, Any] = json.loads(self._line() or "{}")
        if not self.about:
            raise InputError(f"'{words}' did not start; what it printed stands above")

    def turn(self) -> None:
        stdin: IO[str] = self._process.stdin  # type: ignore[assignment]
        stdin.write("go\n")
        stdin.flush()
        self.seconds.append(float(self._line()))

    def _line(self) -> str:
        stdout: IO[str] = self._process.stdout  # type: ignore[assignment]
        return stdout.readline()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def table(variants: Sequence[Variant]) -> str:
    """Milliseconds of each, and its time over the first one's, median (least to greatest) of paired turns."""
    lines = ["| variant | instructions | median ms | least ms | time of the first's |", "|---|---|---:|---:|---:|"]
    for one in variants:
        ratios = [own / first for own, first in zip(one.seconds, variants[0].seconds, strict=True)]
        lines.append(
            f"| {one.words} | {one.about['isa']} | {statistics.median(one.seconds) * 1e3:.2f} | "
            f"{min(one.seconds) * 1e3:.2f} | {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint, artifact or GGUF")
    parser.add_argument("variants", nargs="+", help="LIBRARY[,isa=NAME][,kv=KIND][,threads=N]")
    parser.add_argument("--what", default="prefill:512", help=f"KIND:N with KIND of {', '.join(KINDS)}")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    kind, _, count = given.what.partition(":")
    if kind not in KINDS or not count.isdigit():
        parser.error(f"--what {given.what}: expected KIND:N with KIND of {', '.join(KINDS)}")
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: at least one")
    variants: list[Variant] = []
    try:
        for words in given.variants:
            variants.append(Variant(words, given.model, kind, int(count)))
        for turn in range(given.rounds):
            first = turn % len(variants)
            for one in variants[first:] + variants[:first]:
                one.turn()
            print(f"round {turn + 1} of {given.rounds}", file=sys.stderr)
    finally:
        for one in variants:
            one.close()
    print(table(variants))


if __name__ == "__main__":
    try:
        main()
    except TrilemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
