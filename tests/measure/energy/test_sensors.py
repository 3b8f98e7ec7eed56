"""Energy counters on trees of files shaped like real machines' sysfs."""

from __future__ import annotations

import types

import pytest

from trilemma.measure.energy.sensors import SENSORS, SensorGoneError
from trilemma.measure.energy.sensors.nvml import find_nvml
from trilemma.measure.energy.sensors.rapl import find_rapl

RANGE = 262_143_328_850


def zone(root, name, label, energy_uj, range_uj=RANGE):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(label + "\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder


def spend(folder, uj):
    now = int((folder / "energy_uj").read_text()) + uj
    top = int((folder / "max_energy_range_uj").read_text())
    (folder / "energy_uj").write_text(str(now % (top + 1)))


def test_one_package_counts_its_parts_once(tmp_path):
    """A laptop: package with core and uncore inside, psys around it, the MMIO driver's twin."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "uncore", 1)
    psys = zone(tmp_path, "intel-rapl:1", "psys", 1)
    twin = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 77)
    (sensor,) = find_rapl(tmp_path)
    assert (sensor.name, sensor.scope, sensor.reason) == ("rapl-package", "package", None)
    before = sensor.read()
    for folder, uj in ((package, 3_000_000), (core, 2_000_000), (psys, 9_000_000), (twin, 3_000_000)):
        spend(folder, uj)
    assert sensor.read() - before == pytest.approx(3.0)


def test_two_sockets_and_their_dram_add_up(tmp_path):
    folders = []
    for socket in (0, 1):
        folders.append(zone(tmp_path, f"intel-rapl:{socket}", f"package-{socket}", 100))
        folders.append(zone(tmp_path, f"intel-rapl:{socket}:0", "dram", 50, range_uj=65_712_999_613))
    sensors = {sensor.scope: sensor for sensor in find_rapl(tmp_path)}
    before = {scope: sensor.read() for scope, sensor in sensors.items()}
    for folder, uj in zip(folders, (1_000_000, 200_000, 4_000_000, 300_000), strict=True):
        spend(folder, uj)
    assert sensors["package"].read() - before["package"] == pytest.approx(5.0)
    assert sensors["dram"].read() - before["dram"] == pytest.approx(0.5)


def test_several_dies_are_packages(tmp_path):
    for die in (0, 1):
        zone(tmp_path, f"intel-rapl:{die}", f"package-0-die-{die}", 0)
    (sensor,) = find_rapl(tmp_path)
    spend(tmp_path / "intel-rapl:0", 10)
    spend(tmp_path / "intel-rapl:1", 20)
    assert sensor.read() == pytest.approx(30e-6)


def test_wraps_are_added_up(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_000_000)
    (sensor,) = find_rapl(tmp_path)
    before = sensor.read()
    spend(package, 3_000_000)
    assert int((package / "energy_uj").read_text()) < 3_000_000
    assert sensor.read() - before == pytest.approx(3.0, abs=1e-5)
    for _ in range(3):
        spend(package, RANGE // 2)
        sensor.read()
    assert sensor.read() - before == pytest.approx(3.0 + 1.5 * RANGE * 1e-6, rel=1e-6)
    assert sensor.wrap_j == pytest.approx(RANGE * 1e-6)


def test_no_permission_is_a_reason_with_the_fix(tmp_path, monkeypatch):
    """As seen by a user who is not root; root would read a file of mode 000."""
    import pathlib

    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    read_text = pathlib.Path.read_text

    def refuse(self, *args, **kwargs):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "read_text", refuse)
    (sensor,) = find_rapl(tmp_path)
    assert "sudo chmod" in sensor.reason
    with pytest.raises(SensorGoneError):
        sensor.read()


def test_none_and_empty_trees_say_so(tmp_path):
    assert "no powercap tree" in find_rapl(tmp_path / "absent")[0].reason
    (tmp_path / "intel-rapl").mkdir()
    assert "intel_rapl_msr" in find_rapl(tmp_path)[0].reason


def test_a_counter_that_vanishes_is_noticed(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (sensor,) = find_rapl(tmp_path)
    (package / "energy_uj").unlink()
    with pytest.raises(SensorGoneError, match="intel-rapl:0 can no longer be read"):
        sensor.read()


def fake_nvml(millijoules):
    def total(handle):
        value = millijoules[handle]
        if isinstance(value, Exception):
            raise value
        return value

    return types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(millijoules),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=total,
    )


def test_gpus_add_up_in_joules():
    counters = [1_000, 5_000]
    (sensor,) = find_nvml(fake_nvml(counters))
    assert (sensor.scope, sensor.read()) == ("gpu", 6.0)
    counters[1] = RuntimeError("gone")
    with pytest.raises(SensorGoneError, match="gone"):
        sensor.read()


def test_gpus_without_a_counter_or_driver_are_reasons():
    assert "no GPU" in find_nvml(fake_nvml([]))[0].reason
    assert "no total-energy counter" in find_nvml(fake_nvml([RuntimeError("Not Supported")]))[0].reason
    broken = types.SimpleNamespace(nvmlInit=lambda: 1 / 0)
    assert "no NVIDIA driver" in find_nvml(broken)[0].reason


@pytest.mark.parametrize("name", SENSORS.names())
def test_every_sensor_here_reads_or_has_a_reason(name):
    for sensor in SENSORS.get(name)():
        assert sensor.name
        assert sensor.reason or sensor.read() >= 0
