"""Energy counters: one file each and one line in the table. A finder returns sensors or null objects with reasons.

Left out: Apple's counters. They lie behind IOReport, a private framework that needs compiled code for each release of
macOS (zeus carries some); macOS gets a null object that says so, and the estimate.
"""

from __future__ import annotations

from collections.abc import Callable

from trilemma.core.registry import Registry
from trilemma.measure.energy.sensors.sensor import NoSensor, Sensor, SensorGoneError

SENSORS: Registry[Callable[[], list[Sensor]]] = Registry(
    "sensor",
    {
        "rapl": "trilemma.measure.energy.sensors.rapl:find_rapl",
        "nvml": "trilemma.measure.energy.sensors.nvml:find_nvml",
        "hwmon": "trilemma.measure.energy.sensors.hwmon:find_hwmon",
        "ina": "trilemma.measure.energy.sensors.ina:find_ina",
        "battery": "trilemma.measure.energy.sensors.battery:find_battery",
    },
)


def find_sensors() -> list[Sensor]:
    """All counters of this host, null objects included."""
    return [sensor for name in SENSORS.names() for sensor in SENSORS.get(name)()]


__all__ = ["SENSORS", "NoSensor", "Sensor", "SensorGoneError", "find_sensors"]
