"""Watts into joules: a meter that shows only power, polled in a thread of its own and integrated.

The trapezoid rule over the readings. Between two readings w1 and w2, dt apart, a signal that runs monotonically from
one to the other differs from the trapezoid by at most |w2 - w1| dt / 2. Taken as uniform in between and independent
from one interval to the next, their variances add up to `variance_j2`. What rises and falls between two readings is not
seen: the sampling period is stated with every figure.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from trilemma.core.measurement import Scope
from trilemma.measure.energy.sensors.poller import Poller
from trilemma.measure.energy.sensors.sensor import SensorGoneError

PERIOD_S = 0.1


class PowerSensor:
    """Joules by integrating a power reading.

    Args:
        watts: takes one reading; may raise OSError or ValueError.
        what: where the reading is from, for `method`.
        period_s: between readings; not shorter than the interval over which the meter itself averages.
        clock, poll: for tests: made-up time, and no thread.
    """

    wrap_j: float | None = None
    reason: str | None = None

    def __init__(
        self,
        name: str,
        scope: Scope,
        watts: Callable[[], float],
        *,
        what: str,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
        poll: bool = True,
    ) -> None:
        self.name, self.scope = name, scope
        self.method = f"{what}, power polled every {period_s:g} s and integrated by trapezoids"
        self.variance_j2 = 0.0
        self._watts, self._clock = watts, clock
        self._poller = Poller(self._poll, period_s) if poll else None
        self._lock = threading.Lock()
        self._joules, self._readings = 0.0, 0
        self._last: tuple[float, float] | None = None  # seconds, watts

    @property
    def resolution_j(self) -> float:
        """Mean energy between two readings, so that 50 ticks are 50 readings."""
        return self._joules / self._readings if self._readings else 0.0

    def read(self) -> float:
        with self._lock:
            try:
                self._take()
            except (OSError, ValueError) as error:
                raise SensorGoneError(f"{self.name} can no longer be read: {error}") from None
            joules = self._joules
        if self._poller is not None:
            self._poller.start()
        return joules

    def _poll(self) -> None:
        with self._lock:
            try:
                self._take()
            except (OSError, ValueError, SensorGoneError):
                return  # a reading left out widens the error; `read` reports a meter that is gone

    def _take(self) -> None:
        watts, now = self._watts(), self._clock()
        if not math.isfinite(watts) or watts < 0:
            raise SensorGoneError(f"{self.name} reads {watts} W, which is no power")
        if self._last is not None and now > self._last[0]:
            seconds = now - self._last[0]
            self._joules += (watts + self._last[1]) / 2 * seconds
            self.variance_j2 += (abs(watts - self._last[1]) / 2 * seconds) ** 2 / 3
            self._readings += 1
        self._last = (now, watts)
