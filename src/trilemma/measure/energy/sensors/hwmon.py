"""Power and energy meters that the kernel shows as hwmon devices.

Only drivers whose meters are known to cover something whole are counted (`_KNOWN`); parts of a package, and meters of
which nobody says what they cover, are not. INA chips and batteries, which appear here too, have files of their own.
Source of names and labels: the kernel's Documentation/hwmon (amd_energy at v5.8, acpi_power_meter, fam15h_power, ...)
and Documentation/gpu/amdgpu/thermal.rst.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trilemma.core.measurement import Scope
from trilemma.measure.energy.sensors.power import PERIOD_S, PowerSensor
from trilemma.measure.energy.sensors.sensor import NoSensor, Sensor, SensorGoneError

HWMON = Path("/sys/class/hwmon")
_ELSEWHERE = re.compile(r"^(ina|BAT|CMB|AC|ADP|ucsi)")
_FIX = "sudo chmod a+r {path} allows it until the next boot"


@dataclass(frozen=True)
class _Meter:
    """Which files of a driver count: 'energy' (uJ) or 'power' (uW), with labels that match, and what they cover."""

    kind: Literal["energy", "power"]
    label: str
    scope: Scope


_KNOWN = {
    "amd_energy": _Meter("energy", r"^Esocket\d+$", "package"),  # Ecore... are parts of it
    "zenpower": _Meter("power", r"^SVI2_P_(Core|SoC)$", "package"),
    "fam15h_power": _Meter("power", r"", "package"),
    "power_meter": _Meter("power", r"", "wall"),  # ACPI: the power supply's input
    "macsmc_hwmon": _Meter("power", r"^Total System Power$", "wall"),
    "amdgpu": _Meter("power", r"^(PPT|slowPPT|)$", "gpu"),
    "nouveau": _Meter("power", r"", "gpu"),
    "i915": _Meter("energy", r"", "gpu"),  # discrete GPUs only; their tiles are devices of another name
    "xe": _Meter("energy", r"^(card|)$", "gpu"),
}


class HwmonEnergySensor:
    """The sum of energyN_input files: microjoules in 64 bits, accumulated by the driver, so without a wrap."""

    wrap_j: float | None = None
    reason: str | None = None
    method = "hwmon energy counter"
    resolution_j = 61e-6

    def __init__(self, name: str, scope: Scope, files: list[Path]) -> None:
        self.name, self.scope, self._files = name, scope, files
        self._last = 0

    def read(self) -> float:
        total = sum(_read(path, self.name) for path in self._files)
        if total < self._last:
            raise SensorGoneError(f"{self.name} went back from {self._last} to {total} uJ: it was reset")
        self._last = total
        return total * 1e-6


def find_hwmon(root: Path = HWMON, *, clock: Callable[[], float] = time.monotonic, poll: bool = True) -> list[Sensor]:
    """One sensor for each known driver, null objects for meters that can not be counted."""
    if not root.is_dir():
        return [NoSensor("hwmon", "package", f"no hwmon tree at {root} (not Linux, or a container)")]
    files: dict[tuple[str, Scope], list[Path]] = {}
    unknown: dict[str, int] = {}
    for device in sorted(root.iterdir()):
        driver = _text(device / "name")
        if _ELSEWHERE.match(driver):
            continue
        meter = _KNOWN.get(driver)
        chosen = _files(device, meter) if meter else []
        if meter and chosen:
            integrated = driver == "amdgpu" and _is_apu(device)  # there PPT is the power of processor and GPU together
            files.setdefault((driver, "package" if integrated else meter.scope), []).extend(chosen)
        elif _meters(device):
            unknown[driver] = unknown.get(driver, 0) + len(_meters(device))
    found = [_open(driver, scope, chosen, clock, poll) for (driver, scope), chosen in files.items()]
    found += [
        NoSensor(f"hwmon-{driver or 'unnamed'}", "package", f"{count} meters of which is not known what they cover")
        for driver, count in unknown.items()
    ]
    return found or [NoSensor("hwmon", "package", f"no device below {root} measures power or energy")]


def _open(driver: str, scope: Scope, files: list[Path], clock: Callable[[], float], poll: bool) -> Sensor:
    name = f"hwmon-{driver}" if scope == _KNOWN[driver].scope else f"hwmon-{driver}-{scope}"
    try:
        if _KNOWN[driver].kind == "energy":
            counter = HwmonEnergySensor(name, scope, files)
            counter.read()
            return counter
        for path in files:
            _read(path, name)
    except SensorGoneError as error:
        fix = f". {_FIX.format(path=files[0])}" if "Permission" in str(error) else ""
        return NoSensor(name, scope, f"{error}{fix}")
    return PowerSensor(
        name, scope, lambda: sum(_read(path, name) for path in files) * 1e-6, what=f"hwmon driver {driver}",
        period_s=max(PERIOD_S, *(_averaged_s(path) for path in files)), clock=clock, poll=poll,
    )  # fmt: skip


def _files(device: Path, meter: _Meter) -> list[Path]:
    """The device's input files whose label fits; of powerN_average and powerN_input only the first."""
    found: dict[str, Path] = {}
    for path in _meters(device):
        channel = path.name.partition("_")[0]
        fits = channel.startswith(meter.kind) and re.match(meter.label, _text(device / f"{channel}_label"))
        if fits:
            found.setdefault(channel, path)
    return list(found.values())


def _meters(device: Path) -> list[Path]:
    kinds = ("energy[0-9]*_input", "power[0-9]*_average", "power[0-9]*_input")
    return [path for kind in kinds for path in sorted(device.glob(kind))]


def _is_apu(device: Path) -> bool:
    """The northbridge's voltage exists on processors with a GPU inside only."""
    return any(_text(path) == "vddnb" for path in device.glob("in*_label"))


def _averaged_s(path: Path) -> float:
    """Seconds over which the meter averages, where it says so."""
    said = _text(path.with_name(f"{path.name}_interval")) if path.name.endswith("_average") else ""
    return int(said) * 1e-3 if said.isdigit() else 0.0


def _read(path: Path, name: str) -> int:
    try:
        return int(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise SensorGoneError(f"{name} can no longer be read: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
