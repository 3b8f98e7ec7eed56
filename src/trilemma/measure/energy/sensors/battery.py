"""A laptop's battery while it discharges: what the whole machine draws, screen included.

energy_now (microwatt-hours), or charge_now (microampere-hours) times voltage_now. Several batteries add up. Coarse, and
written by firmware every few seconds to a minute: a thread reads it each second and the largest step seen is the
resolution, so that the rule of 50 ticks asks for as long a window as it takes (minutes). Plugged in, it says nothing.
Source: the kernel's Documentation/ABI/testing/sysfs-class-power.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trilemma.core.measurement import Scope
from trilemma.measure.energy.sensors.poller import Poller
from trilemma.measure.energy.sensors.sensor import NoSensor, Sensor, SensorGoneError

POWER_SUPPLY = Path("/sys/class/power_supply")
_J_PER_WH = 3600.0
_PERIOD_S = 1.0


@dataclass(frozen=True)
class _Pack:
    """One battery: what is left in it, in uWh or in uAh."""

    folder: Path
    unit: str  # 'energy' or 'charge'

    def left(self) -> int:
        return _number(self.folder / f"{self.unit}_now")

    def joules(self, spent: float) -> float:
        """Of that many uWh, or uAh at the present voltage."""
        if self.unit == "energy":
            return spent * 1e-6 * _J_PER_WH
        return spent * 1e-6 * _J_PER_WH * _number(self.folder / "voltage_now") * 1e-6

    def tick_j(self) -> float:
        """The largest power of ten (1 to 100 m) that divides all that the gauge says."""
        said = [_number(path) for name in ("now", "full", "full_design") if (path := self._file(name)).exists()]
        step = max(ten for ten in (1, 10, 100, 1000, 10_000, 100_000) if all(value % ten == 0 for value in said))
        return self.joules(max(step, 1000))

    def _file(self, name: str) -> Path:
        return self.folder / f"{self.unit}_{name}"


class BatterySensor:
    """Joules drawn from all batteries since it was found.

    Raises:
        OSError, ValueError: a gauge can not be read.
    """

    name = "battery"
    scope: Scope = "wall"
    method = "battery gauge while discharging, read every second"
    wrap_j: float | None = None
    reason: str | None = None

    def __init__(
        self, packs: Sequence[_Pack], root: Path, *, clock: Callable[[], float] = time.monotonic, poll: bool = True
    ) -> None:
        self._packs, self._root, self._clock = packs, root, clock
        self._last = {pack.folder: pack.left() for pack in packs}
        self._joules, self._at = 0.0, clock()
        self.resolution_j = sum(pack.tick_j() for pack in packs)
        self._lock = threading.Lock()
        self._poller = Poller(self._poll, _PERIOD_S) if poll else None

    def read(self) -> float:
        plugged = _plugged_in(self._root)
        if plugged:
            raise SensorGoneError(f"battery: {plugged}")
        with self._lock:
            try:
                self._take()
            except (OSError, ValueError) as error:
                raise SensorGoneError(f"the battery can no longer be read: {error}") from None
            joules = self._joules
        if self._poller is not None:
            self._poller.start()
        return joules

    def _poll(self) -> None:
        with self._lock:
            try:
                self._take()
            except (OSError, ValueError):
                return  # `read` reports a gauge that is gone

    def _take(self) -> None:
        step = 0.0
        for pack in self._packs:
            left = pack.left()
            step += pack.joules(max(self._last[pack.folder] - left, 0))  # gauges correct themselves upwards at times
            self._last[pack.folder] = left
        self._joules += step
        now = self._clock()
        if now - self._at < 3 * _PERIOD_S:  # a step between two readings in a row, not what came together in a pause
            self.resolution_j = max(self.resolution_j, step)
        self._at = now


def find_battery(
    root: Path = POWER_SUPPLY, *, clock: Callable[[], float] = time.monotonic, poll: bool = True
) -> list[Sensor]:
    """The sensor, or a null object: no battery, plugged in, or a gauge without numbers."""
    folders = [] if not root.is_dir() else [folder for folder in sorted(root.iterdir()) if _is_battery(folder)]
    if not folders:
        return [NoSensor("battery", "wall", f"no battery below {root}")]
    plugged = _plugged_in(root)
    if plugged:
        return [NoSensor("battery", "wall", plugged)]
    packs = [pack for folder in folders if (pack := _pack(folder)) is not None]
    if len(packs) < len(folders):
        return [NoSensor("battery", "wall", f"{folders[0].name} shows neither energy_now nor charge_now")]
    try:
        return [BatterySensor(packs, root, clock=clock, poll=poll)]
    except (OSError, ValueError) as error:
        return [NoSensor("battery", "wall", f"the battery can not be read: {error}")]


def _is_battery(folder: Path) -> bool:
    """Of the machine: a mouse's has scope Device."""
    return _is_a_battery(folder) and _text(folder / "scope") != "Device"


def _is_a_battery(folder: Path) -> bool:
    return _text(folder / "type") == "Battery"


def _pack(folder: Path) -> _Pack | None:
    if (folder / "energy_now").exists():
        return _Pack(folder, "energy")
    if (folder / "charge_now").exists() and (folder / "voltage_now").exists():
        return _Pack(folder, "charge")
    return None


def _plugged_in(root: Path) -> str:
    """Why the batteries do not show what the machine draws; '' when they do."""
    try:
        folders = sorted(root.iterdir())
    except OSError as error:
        return f"can no longer be read: {error}"
    states = {folder.name: _text(folder / "status") for folder in folders if _is_battery(folder)}
    said = ", ".join(f"{name} says {state or 'nothing'}" for name, state in states.items())
    online = [folder.name for folder in folders if not _is_a_battery(folder) and _text(folder / "online") == "1"]
    if online:
        return f"plugged in ({', '.join(online)} is online, {said}); pull the plug to measure by battery"
    if "Discharging" not in states.values() or "Charging" in states.values():
        return f"not discharging ({said or 'no battery'}); pull the plug to measure by battery"
    return ""


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii").strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
