"""Seconds and joules of building: by counter where there is one, else by the power model and labelled so."""

from __future__ import annotations

import pytest

from trilemma.measure.energy.build_cost import BuildMeter
from trilemma.measure.energy.energy_model import DEVICES
from trilemma.measure.energy.sensors import NoSensor, SensorGoneError


class Counter:
    """Counts 30 W; may vanish."""

    reason, wrap_j, resolution_j = None, None, 1e-4

    def __init__(self, clock, scope="package"):
        self.name, self.scope, self._clock, self.gone = scope, scope, clock, False

    def read(self):
        if self.gone:
            raise SensorGoneError("gone")
        return 30 * self._clock()


@pytest.fixture
def times():
    return {"wall": 100.0, "cpu": 7.0}


def meter(times, sensors):
    return BuildMeter(
        sensors=sensors, device="laptop", clock=lambda: times["wall"], cpu_clock=lambda: times["cpu"]
    )  # fmt: skip


def test_estimated_without_a_counter(times):
    with meter(times, [NoSensor("rapl", "package", "no permission")]) as running:
        times["wall"] += 20
        times["cpu"] += 30  # more than one core worked
        assert running.results()["build_s"].value == pytest.approx(20)
    times["wall"] += 99  # what comes after does not count
    found = running.results()
    power = DEVICES["laptop"]
    expected = power.base_w * 20 + power.core_w * 30
    assert found["build_s"].value == pytest.approx(20)
    energy = found["build_energy_j"]
    assert (energy.source, energy.value) == ("estimated", pytest.approx(expected))
    assert energy.ci95 == pytest.approx((expected / power.factor, expected * power.factor))


def test_measured_by_counters_of_the_host_alone(times):
    clock = lambda: times["wall"]  # noqa: E731
    with meter(times, [Counter(clock), Counter(clock, "dram"), Counter(clock, "gpu")]) as running:
        times["wall"] += 10
    energy = running.results()["build_energy_j"]
    assert (energy.source, energy.sensor, energy.value) == ("measured", "package+dram", pytest.approx(600))


def test_a_counter_that_vanishes_leaves_an_estimate(times):
    counter = Counter(lambda: times["wall"])
    with meter(times, [counter]) as running:
        times["wall"] += 10
        counter.gone = True
    assert running.results()["build_energy_j"].source == "estimated"


def test_a_counter_that_stalls_leaves_an_estimate_with_the_reason(times):
    with meter(times, [Counter(lambda: 0.0)]) as running:
        times["wall"] += 10
    energy = running.results()["build_energy_j"]
    assert energy.source == "estimated"
    assert "did not move" in energy.method


def test_the_wall_is_not_added_to_the_package(times):
    clock = lambda: times["wall"]  # noqa: E731
    with meter(times, [Counter(clock), Counter(clock, "wall")]) as running:
        times["wall"] += 10
    energy = running.results()["build_energy_j"]
    assert (energy.sensor, energy.scope, energy.value) == ("wall", "wall", pytest.approx(300))
