"""A thread that takes a sensor's readings at an interval, for as long as the sensor lives.

It holds the sensor weakly: a list of sensors that is dropped takes its threads along, so nobody has to close them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable


class Poller:
    """Calls a bound method at an interval once `start` was called.

    Args:
        method: of the object that owns this poller; what it raises is its own matter, it must not raise here.
        period_s: between calls.
    """

    def __init__(self, method: Callable[[], None], period_s: float) -> None:
        self.period_s = period_s
        self._method = weakref.WeakMethod(method)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._method, self.period_s), daemon=True)
            self._thread.start()


def _run(reference: weakref.WeakMethod[Callable[[], None]], period_s: float) -> None:
    pause = threading.Event()
    while not pause.wait(period_s):
        method = reference()
        if method is None:
            return
        method()
        del method
