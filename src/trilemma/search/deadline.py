"""The effort that `--time` allows: how much is left, and whether one more step fits."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from trilemma.core.errors import InputError

_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(s|sec|m|min|h)?\s*$")
_FACTORS = {None: 1.0, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_time(text: str | float) -> float:
    """'20s', '5m', '1.5h' or bare seconds, in seconds.

    Raises:
        InputError: not a time, or not above zero.
    """
    match = _PATTERN.match(str(text))
    seconds = float(match.group(1)) * _FACTORS[match.group(2)] if match else 0.0
    if seconds <= 0:
        raise InputError(f"Can not read the time '{text}'. Expected a number above zero with s, m or h: 90s, 5m, 1h.")
    return seconds


class Deadline:
    """Counts down from the moment it is made. `spent_before_s` is what an interrupted run already used of it."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._began = clock()

    @property
    def spent_s(self) -> float:
        return self._clock() - self._began

    @property
    def left_s(self) -> float:
        return max(0.0, self.limit_s - self.spent_s)

    def allows(self, seconds: float, *, reserve_s: float = 0.0) -> bool:
        """Whether a step of that length fits and still leaves the reserve."""
        return self.left_s >= seconds + reserve_s
