"""Did the machine move while we measured? A fixed piece of work, timed again and again, tells.

The work runs on as many threads as the engine uses, so that a busy neighbour on any of those cores
is felt. On Linux the share of the cores that other processes took (and that a hypervisor stole) is
read as well.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

MOVED = 0.05  # the machine moved when the loop's time changed by more than this
FOREIGN_SHARE = 0.05  # or when others took more than this share of the cores
_TRIES = 3
_TARGET_S = 0.005
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
        """Seconds of the work now: the median of three tries."""
        self.times_s.append(sorted(self._pass() for _ in range(_TRIES))[_TRIES // 2])
        return self.times_s[-1]

    @property
    def drift(self) -> float:
        """Largest relative difference between two probes."""
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
    def reason(self) -> str | None:
        """Why the run is noisy, or None when it is not."""
        if self.drift > MOVED:
            return f"the reference loop moved by {self.drift:.0%}"
        share = self.foreign_share
        if share is not None and share > FOREIGN_SHARE:
            return f"other work took {share:.0%} of the cores"
        return None

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
        own = time.process_time()
        return total, total - idle, own
