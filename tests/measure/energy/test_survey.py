"""`trilemma list sensors`: every sensor with its state, the reason and the fix where there is none."""

from __future__ import annotations

from trilemma.measure.energy.sensors import NoSensor, SensorGoneError
from trilemma.measure.energy.sensors.rapl import find_rapl
from trilemma.measure.energy.sensors.survey import survey


class Broken:
    name, scope, reason, wrap_j, resolution_j = "nvml", "gpu", None, None, 2.0

    def read(self):
        raise SensorGoneError("NVML can no longer be read")


def test_each_sensor_has_its_state(tree):
    package, dram = tree.zone("intel-rapl:0", "package-0"), tree.zone("intel-rapl:0:0", "dram")

    def sleep(seconds):
        tree.now += seconds
        tree.spend(package, round(12e6 * seconds))

    sensors = [*find_rapl(tree.powercap, clock=tree.clock), Broken(), NoSensor("battery", "wall", "no battery")]
    found = survey(sensors, clock=tree.clock, sleep=sleep)
    assert found["rapl-package"] == "package, RAPL counter; 12.0 W just now"
    assert "did not move in 0.5 s" in found["rapl-dram"]
    assert found["nvml"] == "unavailable: NVML can no longer be read"
    assert found["battery"] == "unavailable: no battery"
    assert dram.exists()


def test_nobody_waits_where_there_is_nothing_to_watch():
    assert survey([NoSensor("rapl", "package", "none")], sleep=lambda s: 1 / 0) == {"rapl": "unavailable: none"}


def test_two_of_one_name_are_both_shown():
    found = survey([NoSensor("hwmon-mystery", "package", "a"), NoSensor("hwmon-mystery", "wall", "b")])
    assert found == {"hwmon-mystery": "unavailable: a", "hwmon-mystery (wall)": "unavailable: b"}
