"""What an energy counter offers, and the null object that says why there is none."""

from __future__ import annotations

from typing import Protocol

from trilemma.core.measurement import Scope


class Sensor(Protocol):
    """A counter of joules. `read` never goes backwards; a wrap of the hardware is added up.

    resolution_j: one tick; wrap_j: where the hardware counter starts again (None: never), so that it
    must be read more often than the energy of one turn takes.
    """

    name: str
    scope: Scope
    resolution_j: float
    wrap_j: float | None

    @property
    def reason(self) -> str | None:
        """Why there is no counter, with the fix; None when there is one."""
        ...

    def read(self) -> float:
        """Joules since an arbitrary start. Raises SensorGoneError when the counter vanished."""
        ...


class SensorGoneError(Exception):
    """A counter that was there can no longer be read."""


class NoSensor:
    """The null object: present in every list, with a reason instead of a counter."""

    resolution_j = 0.0
    wrap_j: float | None = None

    def __init__(self, name: str, scope: Scope, reason: str) -> None:
        self.name, self.scope = name, scope
        self._reason = reason

    @property
    def reason(self) -> str | None:
        return self._reason

    def read(self) -> float:
        raise SensorGoneError(self._reason)
