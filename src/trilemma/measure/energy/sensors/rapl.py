"""RAPL through the kernel's powercap tree (Intel, and AMD since Linux 5.8).

Packages are summed over sockets and dies. DRAM zones are separate counters beside their package on
servers; `psys` (the whole platform) contains the packages and is left out, and so are `core` and
`uncore`, which are parts of a package. The same zone offered by both the MSR and the MMIO driver
counts once.
Source of the meaning of zones: the kernel's Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from trilemma.core.measurement import Scope
from trilemma.measure.energy.sensors.sensor import NoSensor, Sensor, SensorGoneError

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"^package-\d+(-die-\d+)?$")
_PERMISSION_FIX = (
    "readable by root only. Allow it until the next boot: "
    "sudo chmod -R a+r /sys/class/powercap/*/energy_uj (or a udev rule), or run as root"
)


@dataclass
class RaplSensor:
    """The sum of some zones; each keeps its own account of wraps."""

    name: str
    scope: Scope
    zones: list[Path]
    resolution_j: float = 61e-6  # 2^-14 J, the usual energy unit
    wrap_j: float | None = None
    _last: dict[Path, int] = field(default_factory=dict)
    _turns: dict[Path, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ranges = {zone: _number(zone / "max_energy_range_uj") for zone in self.zones}
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
        if now < self._last.get(zone, 0):
            self._turns[zone] = self._turns.get(zone, 0) + 1
        self._last[zone] = now
        return now + self._turns.get(zone, 0) * self._ranges[zone]


def find_rapl(root: Path = POWERCAP) -> list[Sensor]:
    """A 'package' and, where there is one, a 'dram' sensor; a null object with the reason where not."""
    if not root.is_dir():
        return [NoSensor("rapl", "package", f"no powercap tree at {root} (not Linux, or a virtual machine)")]
    named: dict[str, Path] = {}
    for zone in sorted(root.glob("intel-rapl*:*")):
        label = _label(zone)
        if label is not None:
            key = label if _PACKAGE.match(label) else f"{_parent_label(zone)}/{label}"
            if key not in named or "mmio" in named[key].name:  # the MSR driver's zone is preferred
                named[key] = zone
    packages = [zone for key, zone in named.items() if _PACKAGE.match(key)]
    drams = [zone for key, zone in named.items() if key.endswith("/dram")]
    if not packages:
        return [NoSensor("rapl", "package", f"no RAPL package zone below {root}; load the module intel_rapl_msr")]
    found: list[Sensor] = [_open("rapl-package", "package", packages)]
    if drams:
        found.append(_open("rapl-dram", "dram", drams))
    return found


def _open(name: str, scope: Scope, zones: list[Path]) -> Sensor:
    try:
        sensor = RaplSensor(name, scope, zones)
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
    except OSError:
        return None


def _parent_label(zone: Path) -> str:
    """'intel-rapl:0:2' lies in 'intel-rapl:0'; its package's name keeps two sockets' DRAM apart."""
    parent = zone.parent / zone.name.rpartition(":")[0]
    return _label(parent) or parent.name


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii").strip())
