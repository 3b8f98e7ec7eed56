"""No joule is counted twice: which sensors of a host make up the sum, on trees of files where time passes."""

from __future__ import annotations

import shutil

import pytest
from sysfs_tree import RAPL_RANGE

from trilemma.measure.energy.counting import HOST, levels, settle
from trilemma.measure.energy.sensors import NoSensor, SensorGoneError
from trilemma.measure.energy.sensors.battery import find_battery
from trilemma.measure.energy.sensors.hwmon import find_hwmon
from trilemma.measure.energy.sensors.ina import find_ina
from trilemma.measure.energy.sensors.rapl import find_rapl
from trilemma.measure.energy.window import Work, measure_energy


class Fixed:
    """Moves by what `joules` says."""

    reason, wrap_j = None, None

    def __init__(self, name, scope, resolution_j=1e-3):
        self.name, self.scope, self.resolution_j = name, scope, resolution_j


def names(found):
    return [level.name for level in found]


def test_the_widest_comes_first_and_gpus_only_on_request():
    sensors = [
        Fixed("rapl-package", "package"), Fixed("rapl-dram", "dram"), Fixed("battery", "wall"), Fixed("nvml", "gpu"),
        Fixed("ina-GPU+CPU", "soc"), NoSensor("hwmon", "package", "none"),
    ]  # fmt: skip
    assert names(levels(sensors)) == ["battery", "ina-GPU+CPU", "rapl-package+rapl-dram"]
    with_gpu = levels(sensors, (*HOST, "gpu"))
    assert names(with_gpu) == ["battery", "ina-GPU+CPU+nvml", "rapl-package+rapl-dram+nvml", "nvml"]
    assert with_gpu[2].scopes == "package+dram+gpu"


def test_two_sources_of_one_scope_see_the_same_joules():
    sensors = [Fixed("hwmon-amd_energy", "package"), Fixed("rapl-package", "package")]
    assert names(levels(sensors)) == ["rapl-package"]
    cards = [Fixed("nvml", "gpu"), Fixed("hwmon-amdgpu", "gpu"), Fixed("rapl-package", "package")]
    assert names(levels(cards, (*HOST, "gpu")))[0] == "rapl-package+nvml+hwmon-amdgpu"  # other boards, other joules


def test_dram_alone_is_no_host_and_a_gpu_is_never_left_out():
    assert levels([Fixed("rapl-dram", "dram")]) == []
    assert levels([Fixed("rapl-package", "package")], (*HOST, "gpu")) == []
    assert names(levels([Fixed("ina-VDD_IN", "wall")], (*HOST, "gpu"))) == ["ina-VDD_IN"]  # it feeds the GPU


def test_a_coarse_gauge_does_not_spoil_what_a_fine_counter_measured():
    choices = levels([Fixed("battery", "wall", 36.0), Fixed("rapl-package", "package", 6e-5)])
    assert settle(choices, {"battery": 72.0, "rapl-package": 60.0}).name == "rapl-package"
    assert settle(choices, {"battery": 3600.0, "rapl-package": 3000.0}).name == "battery"


def test_a_counter_that_never_moves_is_no_measurement():
    package, dram = Fixed("rapl-package", "package"), Fixed("rapl-dram", "dram")
    with pytest.raises(SensorGoneError, match="did not move"):
        settle(levels([package, dram]), {"rapl-package": 0.0, "rapl-dram": 0.0})
    with pytest.raises(SensorGoneError, match="did not move"):
        settle(levels([package, dram]), {"rapl-package": 0.0, "rapl-dram": 5.0})
    assert settle(levels([package, dram]), {"rapl-package": 5.0, "rapl-dram": 0.0}).name == "rapl-package"
    gpu = levels([package, Fixed("nvml", "gpu")], ("package", "gpu"))
    with pytest.raises(SensorGoneError, match="did not move"):
        settle(gpu, {"rapl-package": 5.0, "nvml": 0.0})


def test_too_few_ticks_name_the_window_that_would_do():
    choices = levels([Fixed("battery", "wall", 36.0)])
    with pytest.raises(SensorGoneError, match="about 25 times as long"):
        settle(choices, {"battery": 72.0})


class Laptop:
    """RAPL and a battery; 12 W in the package, 4 W in DRAM, 20 W in all, 5 W of it when idle."""

    def __init__(self, tree, request_s=0.1):
        self.tree, self.request_s = tree, request_s
        self.package = tree.zone("intel-rapl:0", "package-0", 262_140_000_000)  # wraps within a second
        self.dram = tree.zone("intel-rapl:0:0", "dram", 0, 65_712_999_613)
        self.pack, self.left = tree.battery(energy_now=50_000_000, energy_full=57_010_000), 50e6
        tree.mains(0)
        self.plug_at = float("inf")

    def sensors(self):
        tree = self.tree
        return [
            *find_rapl(tree.powercap, clock=tree.clock), *find_battery(tree.supply, clock=tree.clock, poll=False),
            *find_hwmon(tree.hwmon_root, clock=tree.clock, poll=False),
            *find_ina(tree.hwmon_root, tree.iio, clock=tree.clock, poll=False),
        ]  # fmt: skip

    def work(self, seconds, share=1.0):
        self.tree.now += seconds
        self.tree.spend(self.package, round(12e6 * seconds * share))
        self.tree.spend(self.dram, round(4e6 * seconds * share))
        self.left -= 20 * seconds * share / 3600 * 1e6
        self.tree.write(self.pack, energy_now=round(self.left / 10_000) * 10_000)
        if self.tree.now > self.plug_at:
            self.tree.mains(1)

    def run(self):
        self.work(self.request_s)
        return Work(10, round(100 * self.request_s))

    def measure(self, **more):
        return measure_energy(
            self.run, self.sensors(), clock=self.tree.clock, sleep=lambda s: self.work(s, 0.25), **more
        )


def test_a_laptop_in_a_short_window_is_measured_by_rapl(tree):
    found = Laptop(tree).measure()
    energy = found["energy_j_per_output_token"]
    assert (energy.sensor, energy.scope, energy.noisy) == ("rapl-package+rapl-dram", "package", False)
    assert energy.value == pytest.approx(16 * 0.1 / 10, rel=1e-4)  # the counter wrapped on the way
    assert energy.conditions["scopes"] == "package+dram"
    assert "battery (wall)" in energy.conditions["read_but_not_counted"]
    assert energy.conditions["battery_j"] == pytest.approx(20 * energy.window_s, abs=80)
    assert found["idle_power_w"].value == pytest.approx(4.0, rel=1e-3)


def test_a_laptop_in_a_long_window_is_measured_by_its_battery(tree):
    found = Laptop(tree, request_s=5.0).measure(min_window_s=200, idle_s=90)
    energy = found["energy_j_per_output_token"]
    assert (energy.sensor, energy.scope, energy.noisy) == ("battery", "wall", False)
    assert energy.value == pytest.approx(0.2, rel=0.05)
    assert energy.ci95[0] <= 0.2 <= energy.ci95[1]
    assert energy.conditions["rapl-package_j"] == pytest.approx(12 * energy.window_s, rel=1e-3)
    assert found["idle_power_w"].source == "measured"


def test_a_laptop_plugged_in_meanwhile_falls_back_to_rapl(tree):
    laptop = Laptop(tree, request_s=5.0)
    laptop.plug_at = tree.now + 150
    energy = laptop.measure(min_window_s=200)["energy_j_per_output_token"]
    assert energy.sensor == "rapl-package+rapl-dram"
    assert energy.value == pytest.approx(0.16, rel=1e-4)
    assert "plugged in" in energy.conditions["read_but_not_counted"]


def test_a_zone_that_vanishes_meanwhile_ends_the_window_with_the_reason(tree):
    zones = [tree.zone(f"intel-rapl:{socket}", f"package-{socket}", 10) for socket in (0, 1)]
    began = tree.now

    def pass_time(seconds):
        tree.now += seconds
        for zone in zones:
            if zone.exists():
                tree.spend(zone, round(30e6 * seconds))
        if tree.now > began + 4 and zones[1].exists():
            shutil.rmtree(zones[1])

    def run():
        pass_time(0.1)
        return Work(0, 10)

    sensors = find_rapl(tree.powercap, clock=tree.clock)
    with pytest.raises(SensorGoneError, match="intel-rapl:1 can no longer be read"):
        measure_energy(run, sensors, clock=tree.clock, sleep=pass_time)
    assert tree.now < began + 6  # and not after the longest window


def test_two_sockets_over_a_window_in_which_one_wraps(tree):
    zones = [
        tree.zone("intel-rapl:0", "package-0", 10),
        tree.zone("intel-rapl:1", "package-1", RAPL_RANGE - 50_000_000),
    ]

    def pass_time(seconds):
        tree.now += seconds
        for zone, watts in zip(zones, (30, 40), strict=True):
            tree.spend(zone, round(watts * 1e6 * seconds))

    def run():
        pass_time(0.1)
        return Work(0, 10)

    sensors = find_rapl(tree.powercap, clock=tree.clock)
    found = measure_energy(run, sensors, clock=tree.clock, sleep=pass_time, idle_s=0.5)
    assert int((zones[1] / "energy_uj").read_text()) < RAPL_RANGE / 2
    assert found["energy_j_per_output_token"].value == pytest.approx(70 * 0.1 / 10, rel=1e-5)
    assert found["power_w"].value == pytest.approx(70, rel=1e-5)


def test_a_gauge_alone_is_noisy_or_refused_when_time_is_short(tree):
    laptop = Laptop(tree, request_s=0.5)
    sensors = find_battery(tree.supply, clock=tree.clock, poll=False)

    def measure(**more):
        return measure_energy(
            laptop.run, sensors, clock=tree.clock, sleep=lambda s: laptop.work(s, 0.25), **more
        )  # fmt: skip

    found = measure(min_window_s=5.0)  # at most ten times that: about 28 ticks of 36 J
    energy = found["energy_j_per_output_token"]
    assert energy.noisy
    assert "of 50 ticks" in energy.method
    assert energy.ci95[0] <= 0.2 <= energy.ci95[1]
    assert found["idle_power_w"].source == "unavailable"
    assert "ticks" in found["idle_power_w"].reason
    assert "idle_subtracted_j_per_output_token" not in energy.conditions
    with pytest.raises(SensorGoneError, match="times as long"):
        measure(min_window_s=0.5)


def test_a_board_states_how_its_power_was_integrated(tree):
    """The rail swings between 6 and 8 W at every reading, so each interval is 1 W unsure."""
    device = tree.jetson_orin_nano(milliamperes=1200)
    sensors = find_ina(tree.hwmon_root, tree.iio, clock=tree.clock, poll=False)

    def step(seconds):
        for _ in range(round(seconds / 0.02)):
            tree.now += 0.02
            swing = 1600 if "1200" in (device / "curr1_input").read_text() else 1200
            tree.write(device, curr1_input=swing)
            sensors[0]._poll()

    def run():
        step(0.1)
        return Work(0, 10)

    found = measure_energy(run, sensors, clock=tree.clock, sleep=step)
    energy = found["energy_j_per_output_token"]
    assert (energy.sensor, energy.scope) == ("ina-VDD_IN", "wall")
    assert energy.value == pytest.approx(7.0 * 0.1 / 10, rel=1e-2)
    readings = energy.window_s / 0.02
    unsure_j = 2 * (readings / 3) ** 0.5 * 0.02  # two standard deviations of a sum of uniform ones
    assert energy.conditions["integration_error_j"] == pytest.approx(unsure_j, rel=0.05)
    assert energy.ci95[0] < energy.value * (1 - 0.9 * unsure_j / (7 * energy.window_s))
    assert "trapezoids" in energy.method
