"""What there is to read on this host, one line a sensor: what it covers and shows right now, or why there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from trilemma.measure.energy.sensors import Sensor, SensorGoneError, find_sensors
from trilemma.measure.energy.sensors.sensor import method_of

WATCH_S = 0.5


def survey(
    sensors: Sequence[Sensor] | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, str]:
    """name -> state, of all sensors of this host; those that can be read are watched for half a second.

    Args:
        sensors: by default all of this host.
        clock, sleep: time, for tests.
    """
    found = find_sensors() if sensors is None else sensors
    before = {sensor.name: _read(sensor) for sensor in found if sensor.reason is None}
    began = clock()
    if before:
        sleep(WATCH_S)
    states: dict[str, str] = {}
    for sensor in found:
        name = sensor.name if sensor.name not in states else f"{sensor.name} ({sensor.scope})"
        states[name] = _state(sensor, before.get(sensor.name, 0.0), clock() - began)
    return states


def _state(sensor: Sensor, before: float | str, seconds: float) -> str:
    if sensor.reason is not None:
        return f"unavailable: {sensor.reason}"
    after = _read(sensor)
    if isinstance(before, str):
        return f"unavailable: {before}"
    if isinstance(after, str):
        return f"unavailable: {after}"
    what = f"{sensor.scope}, {method_of(sensor)}"
    if after <= before:
        return f"{what}; did not move in {seconds:.1f} s (a tick is {sensor.resolution_j:.3g} J)"
    return f"{what}; {(after - before) / seconds:.1f} W just now"


def _read(sensor: Sensor) -> float | str:
    try:
        return float(sensor.read())
    except SensorGoneError as error:
        return str(error)
