"""What an energy counter offers, and the null object that says why there is none."""

from __future__ import annotations

from typing import Protocol

from trilemma.core.measurement import Scope


class Sensor(Protocol):
    """A counter of joules. `read` never goes backwards; a wrap of the hardware is added up.

    resolution_j: one tick; wrap_j: where the hardware counter starts again (None: never), so that it
    must be read more often than the energy of one turn takes. The part of `name` before a '-' is the source:
    sensors of one source and scope are disjoint and add up, those of two sources may see the same joules.

    A sensor may also have `method` (how it reads, in words) and `variance_j2` (of what it has counted so far, in J^2,
    where it integrates power); see `method_of` and `variance_of`.
    """

    name: str
    scope: Scope

    @property
    def resolution_j(self) -> float: ...

    @property
    def wrap_j(self) -> float | None: ...

    @property
    def reason(self) -> str | None:
        """Why there is no counter, with the fix; None when there is one."""
        ...

    def read(self) -> float:
        """Joules since an arbitrary start. Raises SensorGoneError when the counter vanished."""
        ...


class SensorGoneError(Exception):
    """A counter that was there can no longer be read, or can not be believed."""


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


def method_of(sensor: Sensor) -> str:
    """How the sensor reads, in words."""
    return str(getattr(sensor, "method", "counter"))


def variance_of(sensor: Sensor) -> float:
    """Of the sensor's count so far, in J^2; 0 for a counter of the hardware."""
    return float(getattr(sensor, "variance_j2", 0.0))


def source_of(sensor: Sensor) -> str:
    """'rapl' of 'rapl-package'."""
    return sensor.name.partition("-")[0]
