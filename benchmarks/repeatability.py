"""Does `trilemma bench` say the same twice, and does it notice when the machine is not its own?

    python benchmarks/repeatability.py [--model PATH] [--threads 1] [--runs 10]

Bench runs in a fresh process again and again on the machine as it is, which should be idle; then as often beside
a busy loop on one core, which this script starts and ends. Two bars: the idle decode medians lie within 3% of one
another ((greatest - least) / median), and every loaded run is marked noisy. Exits 1 when one is missed, 2 when a
run fails. One JSON line a run goes to stdout with --json, the tables to stdout otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SPREAD_BAR = 0.03
HEARTH = Path(__file__).resolve().parents[1] / "examples" / "models" / "hearth-7m"


class Run(NamedTuple):
    """One bench: the median decode rate, whether it is marked noisy and why, and the share of rounds set aside."""

    loaded: bool
    decode_tokens_per_s: float
    noisy: bool
    set_aside_share: float
    why: str


@contextmanager
def busy_core() -> Iterator[None]:
    """Another program that never rests, for as long as this lasts."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            yield
            if busy.poll() is not None:
                raise SystemExit("The busy loop ended by itself; nothing was measured beside it.")
        finally:
            busy.kill()


def bench(model: str, options: list[str], loaded: bool) -> Run:
    """`trilemma bench` in a process of its own."""
    command = [sys.executable, "-m", "trilemma", "bench", model, *options, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        raise SystemExit(2)
    decode: dict[str, Any] = json.loads(done.stdout)["rows"][0]["trial"]["measurements"]["decode_tokens_per_s"]
    why = decode["method"].partition("; noisy: ")[2]
    return Run(loaded, decode["value"], decode["noisy"], decode["conditions"]["set_aside_share"], why)


def spread(runs: list[Run]) -> float:
    """Greatest less least median, over the median of medians."""
    rates = [run.decode_tokens_per_s for run in runs]
    return (max(rates) - min(rates)) / statistics.median(rates)


def table(runs: list[Run]) -> str:
    """The runs, one line each."""
    lines = ["| machine | decode tokens/s | set aside | noisy |", "|---|---:|---:|---|"]
    lines += [
        f"| {'one core loaded' if run.loaded else 'as it is'} | {run.decode_tokens_per_s:,.0f} | "
        f"{run.set_aside_share:.0%} | {run.why if run.noisy else 'no'} |"
        for run in runs
    ]
    return "\n".join(lines)


def verdict(idle: list[Run], loaded: list[Run]) -> tuple[str, bool]:
    """Two sentences, and whether both bars are met."""
    moved, marked = spread(idle), sum(run.noisy for run in loaded)
    lines = [
        f"as it is: {len(idle)} decode medians within {moved:.1%} (bar {SPREAD_BAR:.0%}), "
        f"{sum(run.noisy for run in idle)} marked noisy",
        f"one core loaded: {marked} of {len(loaded)} marked noisy (bar: all), medians within {spread(loaded):.1%}",
    ]
    return "\n".join(lines), moved <= SPREAD_BAR and marked == len(loaded)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HEARTH), help="checkpoint, artifact or config.json")
    parser.add_argument("--runs", type=int, default=10, help="of each kind")
    parser.add_argument("--threads", default="1", help="of the engine")
    parser.add_argument("--time", help="passed on to bench: what the repetitions may take")
    parser.add_argument("--scheme", help="passed on to bench")
    parser.add_argument("--json", action="store_true", help="one JSON line a run instead of a table")
    given = parser.parse_args()
    if given.runs < 2:
        parser.error(f"--runs {given.runs}: a spread needs two runs at least")
    options = ["--threads", given.threads]
    options += [
        word for name in ("time", "scheme") if getattr(given, name) for word in (f"--{name}", getattr(given, name))
    ]
    found: dict[bool, list[Run]] = {False: [], True: []}

    def again(loaded: bool) -> None:
        for turn in range(given.runs):
            found[loaded].append(bench(given.model, options, loaded))
            print(f"{'loaded' if loaded else 'idle'} run {turn + 1} of {given.runs}", file=sys.stderr)

    again(False)
    with busy_core():
        again(True)
    words, met = verdict(found[False], found[True])
    runs = [*found[False], *found[True]]
    print("\n".join(json.dumps(run._asdict()) for run in runs) if given.json else table(runs))
    print(words, file=sys.stderr if given.json else sys.stdout)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
