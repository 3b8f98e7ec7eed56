"""Did the machine move while we measured? A fixed piece of work, timed again and again, tells.

The work runs on as many threads as the engine uses, so that a busy neighbour on any of those cores
is felt. On Linux what other processes took of the cores (and what a hypervisor stole) is read as well;
an engine in a child process counts as ours. A pass over memory beside it was tried and does not predict
a model's slow rounds (docs/log.md); those are found in the rounds themselves, see `quiet.py`.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from trilemma.core.environment import usable_cores
from trilemma.measure.timing.quiet import LEAST_ROUNDS, MOVED, level_moved

FOREIGN_SHARE = 0.05  # others took more than this share of the cores: noisy
FOREIGN_CORES = 0.5  # or more than half a core, however many there are
_TRIES = 3
_TARGET_S = 0.0007  # three tries stay below 5 ms where threads are slow to start
_LEAST_ACCOUNT_S = 0.2  # core-seconds below which the kernel's ticks say nothing
_TICKS_OF_DOUBT = 2


class ReferenceLoop:
    """Times fixed work; `probe` before, between and after, then ask `noisy`.

    Args:
        threads: as many as the measured engine uses.
        stat: the kernel's account of processor time (another file in tests).
    """

    def __init__(self, threads: int = 1, *, stat: Path = Path("/proc/stat")) -> None:
        self.threads = max(1, threads)
        self.times_s: list[float] = []
        self._stat = stat
        self._work = [np.linspace(0.1, 0.9, 16_384, dtype=np.float32) for _ in range(self.threads)]
        self._rounds = 1
        self._pool = ThreadPoolExecutor(self.threads)
        self._pass()  # threads start, pages are touched
        while self._best_of(2) < _TARGET_S and self._rounds < 1 << 16:
            self._rounds *= 2
        self._began = self._account()

    def probe(self) -> float:
        """Seconds of the work now: the least of three tries."""
        self.times_s.append(self._best_of(_TRIES))
        return self.times_s[-1]

    @property
    def drift(self) -> float:
        """How far the machine moved: its quiet level in one half of the probes against the other.

        With fewer than ten probes, the largest relative difference between two.
        """
        if len(self.times_s) >= LEAST_ROUNDS:
            return abs(level_moved(self.times_s))
        return max(self.times_s) / min(self.times_s) - 1 if len(self.times_s) > 1 else 0.0

    @property
    def foreign_share(self) -> float | None:
        """Least share of this process's cores that others took since the loop was made; None where unknown.

        The kernel counts in ticks, so two of them are taken off in favour of a quiet machine.
        """
        now, began = self._account(), self._began
        if now is None or began is None or now[0] - began[0] < _LEAST_ACCOUNT_S:
            return None
        doubt = _TICKS_OF_DOUBT / os.sysconf("SC_CLK_TCK")
        return max(0.0, (now[1] - began[1]) - (now[2] - began[2]) - doubt) / (now[0] - began[0])

    @property
    def foreign_reason(self) -> str | None:
        """What others took, where that makes a run noisy."""
        share = self.foreign_share
        if share is None:
            return None
        if share > FOREIGN_SHARE:
            return f"other work took {share:.0%} of the cores"
        cores = share * usable_cores()
        return f"other work took {cores:.1f} cores" if cores > FOREIGN_CORES else None

    @property
    def reason(self) -> str | None:
        """Why the run is noisy, or None when it is not."""
        moved = f"the reference loop moved by {self.drift:.0%}" if self.drift > MOVED else None
        return self.foreign_reason or moved

    @property
    def noisy(self) -> bool:
        return self.reason is not None

    def close(self) -> None:
        self._pool.shutdown()

    def __enter__(self) -> ReferenceLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _best_of(self, tries: int) -> float:
        return min(self._pass() for _ in range(tries))

    def _pass(self) -> float:
        began = time.perf_counter()
        list(self._pool.map(self._spin, self._work))
        return time.perf_counter() - began

    def _spin(self, values: np.ndarray) -> None:
        for _ in range(self._rounds):
            values = np.sqrt(np.exp(values) * values + np.float32(0.1))
            values /= values.max()

    def _account(self) -> tuple[float, float, float] | None:
        """Seconds on our cores: all, busy, and ours."""
        try:
            lines = self._stat.read_text(encoding="ascii").splitlines()
            cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
            tick = os.sysconf("SC_CLK_TCK")
        except (OSError, AttributeError, ValueError):
            return None
        rows = [[int(number) for number in line.split()[1:9]] for line in lines if line.split()[0] in cores]
        if not rows:
            return None
        total = sum(map(sum, rows)) / tick
        idle = sum(row[3] + row[4] for row in rows) / tick
        return total, total - idle, time.process_time() + _children_s()


def _children_s() -> float:
    """Processor seconds of this process's children and theirs, alive or waited for."""
    tick = os.sysconf("SC_CLK_TCK")
    parents: dict[int, tuple[int, float]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                # After the name in parentheses: state, parent, ...; utime, stime, cutime, cstime are 12th to 15th.
                fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            parents[int(folder.name)] = int(fields[1]), sum(map(int, fields[11:15])) / tick
    here = os.getpid()
    waited = os.times()

    def ours(process: int) -> bool:
        while process in parents and process != here:
            process = parents[process][0]
        return process == here

    alive = sum(seconds for process, (_, seconds) in parents.items() if process != here and ours(process))
    return alive + waited.children_user + waited.children_system
