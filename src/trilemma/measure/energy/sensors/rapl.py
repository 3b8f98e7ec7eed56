"""RAPL through the kernel's powercap tree (Intel, and AMD since Linux 5.8).

Packages are summed over sockets and dies. DRAM zones are separate counters beside their package on
servers; `psys` (the whole platform) contains the packages and is left out, as firmware often leaves it wrong, and so
are `core` and `uncore`, which are parts of a package. The same zone offered by both the MSR and the MMIO driver
counts once.
Source of the meaning of zones: the kernel's Documentation/power/powercap/powercap.rst.

A counter is believed only while it can be true: a step back is a wrap when it is at least half of the range (polling
is far faster than half a turn), otherwise a reset; more than 5 kW of one zone is garbage.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trilemma.core.measurement import Scope
from trilemma.measure.energy.sensors.sensor import NoSensor, Sensor, SensorGoneError

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"^package-\d+(-die-\d+)?$")
_MOST_W = 5000.0  # of one zone; the largest packages draw 500 W
_PERMISSION_FIX = (
    "readable by root only. Allow it until the next boot: "
    "sudo chmod -R a+r /sys/class/powercap/*/energy_uj (or a udev rule), or run as root"
)
_MASKED = (
    "the zones below {root} are masked, as container runtimes do: run outside of the container, or start it with "
    "--security-opt systempaths=unconfined (docker, podman) or with -v /sys/devices/virtual/powercap:"
    "/sys/devices/virtual/powercap:ro"
)


@dataclass
class RaplSensor:
    """The sum of some zones; each keeps its own account of wraps."""

    name: str
    scope: Scope
    zones: list[Path]
    clock: Callable[[], float] = time.monotonic
    resolution_j: float = 61e-6  # 2^-14 J, the usual energy unit
    wrap_j: float | None = None
    method: str = "RAPL counter"
    _last: dict[Path, tuple[float, int]] = field(default_factory=dict)
    _turns: dict[Path, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ranges = {zone: _number(zone / "max_energy_range_uj") for zone in self.zones}
        if min(self._ranges.values()) <= 0:
            raise ValueError("max_energy_range_uj is not above 0")
        self.wrap_j = min(self._ranges.values()) * 1e-6
        self._lock = threading.Lock()

    @property
    def reason(self) -> str | None:
        return None

    def read(self) -> float:
        with self._lock:  # a wrap seen by two threads at once would count twice
            return sum(self._zone_uj(zone) for zone in self.zones) * 1e-6

    def _zone_uj(self, zone: Path) -> int:
        try:
            now = _number(zone / "energy_uj")
        except (OSError, ValueError) as error:
            raise SensorGoneError(f"{zone.name} can no longer be read: {error}") from None
        top, at = self._ranges[zone], self.clock()
        if not 0 <= now <= top:
            raise SensorGoneError(f"{zone.name} reads {now} uJ, outside of its range of 0 to {top}")
        since, last = self._last.get(zone, (at, now))
        wrapped = now < last
        if wrapped and last - now < top / 2:
            raise SensorGoneError(f"{zone.name} went back from {last} to {now} uJ: it was reset (suspended?)")
        spent_j = (now - last + wrapped * top) * 1e-6
        if spent_j > _MOST_W * (at - since + 1.0):
            raise SensorGoneError(f"{zone.name} jumped by {spent_j:.0f} J in {at - since:.3f} s: garbage")
        self._turns[zone] = self._turns.get(zone, 0) + wrapped
        self._last[zone] = (at, now)
        return now + self._turns[zone] * top


def find_rapl(root: Path = POWERCAP, *, clock: Callable[[], float] = time.monotonic) -> list[Sensor]:
    """A 'package' and, where there is one, a 'dram' sensor; a null object with the reason where not."""
    if not root.is_dir():
        return [NoSensor("rapl", "package", f"no powercap tree at {root}: {_why_no_tree()}")]
    links = sorted(root.glob("intel-rapl*:*"))
    named: dict[str, Path] = {}
    for zone in links:
        label = _label(zone)
        if label is not None:
            key = label if _PACKAGE.match(label) else f"{_parent_label(zone)}/{label}"
            if key not in named or "mmio" in named[key].name:  # the MSR driver's zone is preferred
                named[key] = zone
    packages = [zone for key, zone in named.items() if _PACKAGE.match(key)]
    drams = [zone for key, zone in named.items() if key.endswith("/dram")]
    if links and not named:
        return [NoSensor("rapl", "package", _MASKED.format(root=root))]
    if not packages:
        return [NoSensor("rapl", "package", f"no RAPL package zone below {root}; load the module intel_rapl_msr")]
    found: list[Sensor] = [_open("rapl-package", "package", packages, clock)]
    if drams:
        found.append(_open("rapl-dram", "dram", drams, clock))
    return found


def _why_no_tree() -> str:
    if sys.platform == "darwin":
        return "macOS has none; its private IOReport framework is not read here"
    return "not Linux, or a virtual machine, whose host keeps the counters"


def _open(name: str, scope: Scope, zones: list[Path], clock: Callable[[], float]) -> Sensor:
    try:
        sensor = RaplSensor(name, scope, zones, clock)
        sensor.read()
    except PermissionError as error:
        return NoSensor(name, scope, f"{error.filename} is {_PERMISSION_FIX}")
    except SensorGoneError as error:
        fix = f": the counters are {_PERMISSION_FIX}" if "Permission" in str(error) else ""
        return NoSensor(name, scope, f"{error}{fix}")
    except (OSError, ValueError) as error:
        return NoSensor(name, scope, f"{zones[0]} can not be read: {error}")
    return sensor


def _label(zone: Path) -> str | None:
    try:
        return (zone / "name").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _parent_label(zone: Path) -> str:
    """'intel-rapl:0:2' lies in 'intel-rapl:0'; its package's name keeps two sockets' DRAM apart."""
    parent = zone.parent / zone.name.rpartition(":")[0]
    return _label(parent) or parent.name


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii").strip())
