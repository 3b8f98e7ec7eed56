"""What of a host lies around its kernels: cache sizes, reading from storage, power where a counter exists."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trilemma.core.device import Figure
from trilemma.measure.energy.counting import Level, levels, settle
from trilemma.measure.energy.energy_model import DeviceEnergy
from trilemma.measure.energy.sensors import Sensor, SensorGoneError, find_sensors

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
POWER_SUPPLIES = Path("/sys/class/power_supply")
_UNKNOWN_CACHES = {2: 1 << 20, 3: 16 << 20}
_STORAGE_BYTES = 192 << 20
_BLOCK = 4 << 20
_WINDOW_S = 2.0
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cache_sizes(root: Path = CPU_CACHES) -> dict[int, int]:
    """Bytes of the second and of the last level cache, {2: ..., 3: ...}; common sizes where the system does not say.

    On a virtual machine the last level is shared with neighbours, and a part of what is written there is ours.
    """
    found: dict[int, int] = {}
    for folder in sorted(root.glob("index*")):
        try:
            level = int((folder / "level").read_text())
            kind, text = (folder / "type").read_text().strip(), (folder / "size").read_text().strip()
            size = int(text.rstrip("KMG")) * _UNITS.get(text[-1:], 1)
        except (OSError, ValueError):
            continue
        if kind != "Instruction":
            found[level] = max(size, found.get(level, 0))
    last = max((size for level, size in found.items() if level >= 2), default=_UNKNOWN_CACHES[3])
    return {2: found.get(2, _UNKNOWN_CACHES[2]), 3: last}


def storage_rate(folder: Path) -> float | None:
    """Bytes per second of reading a fresh file from the disk of `folder`, past the system's cache; None if it can not.

    Best of three readings. Where the system can not be told to forget the file, nothing is measured.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".trilemma-storage-") as file:
            block = os.urandom(_BLOCK)
            for _ in range(_STORAGE_BYTES // _BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return max(_read_cold(file.fileno()) for _ in range(3))
    except OSError:
        return None


def _read_cold(descriptor: int) -> float:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    began, place = time.perf_counter(), 0
    while got := len(os.pread(descriptor, _BLOCK, place)):
        place += got
    return place / (time.perf_counter() - began)


def power_figures(
    constants: DeviceEnergy, cores: int, work: Callable[[], object], *, sensors: list[Sensor] | None = None
) -> tuple[Figure, Figure]:
    """Idle power, and with the cores at work: from a counter of the whole machine or its package, else of the class.

    Args:
        constants: of the device's class, for machines without a counter.
        work: keeps all cores busy for a moment; called again and again while the power is read.
    """
    for level in levels(find_sensors() if sensors is None else sensors):
        try:
            idle, active = _watts(level, lambda: time.sleep(0.1)), _watts(level, work)
        except SensorGoneError:
            continue
        if 0 < idle <= active:
            said = f"{level.name}, {level.scopes} alone, over {_WINDOW_S:g} s"
            return (
                Figure(value=idle, basis="measured", claim=f"{said}, nothing running"),
                Figure(value=active, basis="measured", claim=f"{said}, every core in matrix products"),
            )
    reason = f"no energy counter; class '{constants.name}': {constants.source}"
    return (
        Figure(value=constants.base_w, basis="assumed", claim=f"{reason}; the share of what is not the cores"),
        Figure(
            value=constants.base_w + constants.core_w * cores, basis="assumed", claim=f"{reason}; with {cores} cores"
        ),
    )


def _watts(level: Level, work: Callable[[], object]) -> float:
    """Mean power while work goes on. Raises SensorGoneError for a sensor that vanished or is too coarse for it."""
    began, before = time.perf_counter(), {sensor.name: sensor.read() for sensor in level.sensors}
    while time.perf_counter() - began < _WINDOW_S:
        work()
    spent = {sensor.name: sensor.read() - before[sensor.name] for sensor in level.sensors}
    seconds = time.perf_counter() - began
    return settle([level], spent).joules(spent) / seconds


def battery_wh(root: Path = POWER_SUPPLIES) -> float | None:
    """Energy of all full batteries, or None where there is none (or its gauge counts charge alone)."""
    total = 0.0
    for folder in sorted(root.glob("BAT*")):
        try:
            total += int((folder / "energy_full").read_text()) * 1e-6
        except (OSError, ValueError):
            continue
    return total or None
