"""Idle power and power at work of a profile: from the level of sensors that counts no joule twice."""

from __future__ import annotations

import pytest

from trilemma.measure.device import surroundings
from trilemma.measure.device.surroundings import power_figures
from trilemma.measure.energy.energy_model import DEVICES


class Meter:
    """Draws 2 W, and 8 W more while `busy`; time passes as it is read and slept."""

    reason, wrap_j = None, None

    def __init__(self, machine, name, scope, resolution_j=1e-4):
        self.machine, self.name, self.scope, self.resolution_j = machine, name, scope, resolution_j

    def read(self):
        return self.machine.joules // self.resolution_j * self.resolution_j


class Machine:
    def __init__(self):
        self.now = self.joules = 0.0

    def pass_time(self, seconds, watts=2.0):
        self.now += seconds
        self.joules += watts * seconds


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(surroundings.time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(surroundings.time, "sleep", made.pass_time)
    return made


def figures(machine, sensors):
    return power_figures(DEVICES["laptop"], 4, lambda: machine.pass_time(0.1, 10.0), sensors=sensors)


def test_two_sources_of_the_package_are_not_added(machine):
    sensors = [Meter(machine, "rapl-package", "package"), Meter(machine, "hwmon-amd_energy", "package")]
    idle, active = figures(machine, sensors)
    assert (idle.value, active.value) == (pytest.approx(2.0, rel=1e-3), pytest.approx(10.0, rel=1e-3))
    assert "rapl-package" in idle.claim


def test_a_coarse_gauge_leaves_it_to_the_finer_counter(machine):
    sensors = [Meter(machine, "battery", "wall", 36.0), Meter(machine, "rapl-package", "package")]
    assert "rapl-package" in figures(machine, sensors)[1].claim


def test_a_coarse_gauge_alone_is_no_measurement(machine):
    idle, _ = figures(machine, [Meter(machine, "battery", "wall", 36.0)])
    assert idle.basis == "assumed"
