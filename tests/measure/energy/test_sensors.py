"""Energy counters on trees of files shaped like real machines' sysfs: right joules, or a reason."""

from __future__ import annotations

import pathlib
import shutil
import types

import pytest
from sysfs_tree import DRAM_RANGE, RAPL_RANGE

from trilemma.measure.energy.sensors import SENSORS, SensorGoneError
from trilemma.measure.energy.sensors.nvml import find_nvml
from trilemma.measure.energy.sensors.rapl import find_rapl


def rapl(tree):
    return {sensor.scope: sensor for sensor in find_rapl(tree.powercap, clock=tree.clock)}


def test_one_package_counts_its_parts_once(tree):
    """A laptop: package with core and uncore inside, psys around it, the MMIO driver's twin."""
    package = tree.zone("intel-rapl:0", "package-0", 5_000_000)
    core = tree.zone("intel-rapl:0:0", "core", 1)
    tree.zone("intel-rapl:0:1", "uncore", 1)
    psys = tree.zone("intel-rapl:1", "psys", 1)
    twin = tree.zone("intel-rapl-mmio:0", "package-0", 77)
    (sensor,) = find_rapl(tree.powercap, clock=tree.clock)
    assert (sensor.name, sensor.scope, sensor.reason) == ("rapl-package", "package", None)
    before = sensor.read()
    for folder, uj in ((package, 3_000_000), (core, 2_000_000), (psys, 9_000_000), (twin, 3_000_000)):
        tree.spend(folder, uj)
    assert sensor.read() - before == pytest.approx(3.0)


def test_two_sockets_and_their_dram_add_up(tree):
    folders = []
    for socket in (0, 1):
        folders.append(tree.zone(f"intel-rapl:{socket}", f"package-{socket}", 100))
        folders.append(tree.zone(f"intel-rapl:{socket}:0", "dram", 50, DRAM_RANGE))
    sensors = rapl(tree)
    before = {scope: sensor.read() for scope, sensor in sensors.items()}
    for folder, uj in zip(folders, (1_000_000, 200_000, 4_000_000, 300_000), strict=True):
        tree.spend(folder, uj)
    assert sensors["package"].read() - before["package"] == pytest.approx(5.0)
    assert sensors["dram"].read() - before["dram"] == pytest.approx(0.5)


def test_dram_that_both_drivers_offer_counts_once(tree):
    for driver in ("intel-rapl", "intel-rapl-mmio"):
        tree.zone(f"{driver}:0", "package-0")
        tree.zone(f"{driver}:0:0", "dram", 0, DRAM_RANGE)
    sensors = rapl(tree)
    for driver in ("intel-rapl", "intel-rapl-mmio"):
        tree.spend(tree.powercap / f"{driver}:0:0", 2_000_000)
    assert sensors["dram"].read() == pytest.approx(2.0)


def test_several_dies_are_packages(tree):
    for die in (0, 1):
        tree.zone(f"intel-rapl:{die}", f"package-0-die-{die}", 0)
    (sensor,) = find_rapl(tree.powercap, clock=tree.clock)
    tree.spend(tree.powercap / "intel-rapl:0", 10)
    tree.spend(tree.powercap / "intel-rapl:1", 20)
    assert sensor.read() == pytest.approx(30e-6)


def test_an_amd_processor_has_a_package_and_cores_inside(tree):
    package, core = tree.zone("intel-rapl:0", "package-0", 7, 65_532_610_987), tree.zone("intel-rapl:0:0", "core", 7)
    (sensor,) = find_rapl(tree.powercap, clock=tree.clock)
    before = sensor.read()
    tree.spend(package, 4_000_000)
    tree.spend(core, 3_000_000)
    assert sensor.read() - before == pytest.approx(4.0)


def test_wraps_are_added_up(tree):
    package = tree.zone("intel-rapl:0", "package-0", RAPL_RANGE - 1_000_000)
    (sensor,) = find_rapl(tree.powercap, clock=tree.clock)
    before = sensor.read()
    tree.spend(package, 3_000_000)
    assert int((package / "energy_uj").read_text()) < 3_000_000
    assert sensor.read() - before == pytest.approx(3.0, abs=1e-5)
    for _ in range(30):  # ten turns and more
        tree.now += 300
        tree.spend(package, 2 * RAPL_RANGE // 5)
        sensor.read()
    assert sensor.read() - before == pytest.approx(3.0 + 12 * RAPL_RANGE * 1e-6, rel=1e-6)
    assert sensor.wrap_j == pytest.approx(RAPL_RANGE * 1e-6)


def test_each_zone_wraps_at_its_own_range(tree):
    """Two sockets of different make in one sum; only the small one wraps."""
    large = tree.zone("intel-rapl:0", "package-0", 1_000_000)
    small = tree.zone("intel-rapl:1", "package-1", DRAM_RANGE - 500_000, DRAM_RANGE)
    (sensor,) = find_rapl(tree.powercap, clock=tree.clock)
    assert sensor.wrap_j == pytest.approx(DRAM_RANGE * 1e-6)
    before = sensor.read()
    tree.spend(large, 2_000_000)
    tree.spend(small, 2_000_000)
    assert sensor.read() - before == pytest.approx(4.0, abs=1e-5)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("4000000", "went back"),  # from 5 J to 4 J: no wrap of 262 kJ
        ("900000000000", "outside of its range"),
        ("-5", "outside of its range"),
        ("", "can no longer be read"),
        ("n/a", "can no longer be read"),
        ("100005000000", "garbage"),  # 100 kJ at once
    ],
)
def test_garbage_is_not_counted(tree, written, said):
    package = tree.zone("intel-rapl:0", "package-0", 5_000_000)
    (sensor,) = find_rapl(tree.powercap, clock=tree.clock)
    sensor.read()
    (package / "energy_uj").write_text(written)
    with pytest.raises(SensorGoneError, match=said):
        sensor.read()


def test_no_permission_is_a_reason_with_the_fix(tree, monkeypatch):
    """As seen by a user who is not root; root would read a file of mode 000."""
    tree.zone("intel-rapl:0", "package-0", 1)
    refuse_to_read(monkeypatch, "energy_uj")
    (sensor,) = find_rapl(tree.powercap)
    assert "sudo chmod" in sensor.reason
    with pytest.raises(SensorGoneError):
        sensor.read()


def refuse_to_read(monkeypatch, name):
    read_text = pathlib.Path.read_text

    def refuse(self, *args, **kwargs):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "read_text", refuse)


def test_permission_for_one_socket_of_two_is_not_enough(tree, monkeypatch):
    for socket in (0, 1):
        tree.zone(f"intel-rapl:{socket}", f"package-{socket}", 1)
    read_text = pathlib.Path.read_text

    def refuse(self, *args, **kwargs):
        if self.name == "energy_uj" and self.parent.name.endswith("1"):
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "read_text", refuse)
    assert "sudo chmod" in find_rapl(tree.powercap)[0].reason


def test_none_and_empty_trees_say_so(tree):
    assert "no powercap tree" in find_rapl(tree.powercap)[0].reason
    tree.powercap.mkdir(parents=True)
    assert "intel_rapl_msr" in find_rapl(tree.powercap)[0].reason
    tree.zone("intel-rapl:0", "package-0", 1, 0)
    assert "max_energy_range_uj" in find_rapl(tree.powercap)[0].reason


def test_a_container_that_masks_powercap_is_named(tree):
    """The links are there and lead nowhere."""
    tree.powercap.mkdir(parents=True)
    for name in ("intel-rapl", "intel-rapl:0", "intel-rapl:0:0"):
        (tree.powercap / name).symlink_to(tree.root / "devices/virtual/powercap" / name)
    (sensor,) = find_rapl(tree.powercap)
    assert "masked" in sensor.reason
    assert "--security-opt" in sensor.reason


def test_a_counter_that_vanishes_is_noticed(tree):
    package = tree.zone("intel-rapl:0", "package-0", 1)
    (sensor,) = find_rapl(tree.powercap)
    shutil.rmtree(package)
    with pytest.raises(SensorGoneError, match="intel-rapl:0 can no longer be read"):
        sensor.read()


def fake_nvml(millijoules, milliwatts=()):
    def total(handle):
        return answer(millijoules[handle])

    def power(handle):
        return answer(milliwatts[handle])

    def answer(value):
        if isinstance(value, Exception):
            raise value
        return value

    return types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(millijoules),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=total,
        nvmlDeviceGetPowerUsage=power,
    )


def test_gpus_add_up_in_joules():
    counters = [1_000, 5_000]
    (sensor,) = find_nvml(fake_nvml(counters))
    assert (sensor.scope, sensor.read()) == ("gpu", 6.0)
    counters[0] = 500
    with pytest.raises(SensorGoneError, match="went back"):
        sensor.read()
    counters[1] = RuntimeError("gone")
    with pytest.raises(SensorGoneError, match="gone"):
        sensor.read()


def test_a_gpu_without_the_counter_is_polled_for_power():
    no = RuntimeError("Not Supported")
    counted, polled = find_nvml(fake_nvml([3_000, no], [0, 60_000]))
    assert (counted.name, counted.read()) == ("nvml", 3.0)
    assert (polled.name, polled.scope, polled.reason) == ("nvml-power", "gpu", None)
    assert "polled every 0.1 s" in polled.method
    assert polled.read() == 0.0  # from here on it integrates


def test_gpus_without_a_counter_or_driver_are_reasons():
    no = RuntimeError("Not Supported")
    assert "no GPU" in find_nvml(fake_nvml([]))[0].reason
    assert "no total-energy counter" in find_nvml(fake_nvml([no], [no]))[0].reason
    broken = types.SimpleNamespace(nvmlInit=lambda: 1 / 0)
    assert "no NVIDIA driver" in find_nvml(broken)[0].reason


@pytest.mark.parametrize("name", SENSORS.names())
def test_every_sensor_here_reads_or_has_a_reason(name):
    found = SENSORS.get(name)()
    assert found
    for sensor in found:
        assert sensor.name
        assert sensor.reason or sensor.read() >= 0
