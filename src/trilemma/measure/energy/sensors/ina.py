"""INA power monitors of boards: Jetson's INA3221 under hwmon or, with older kernels, iio; single INA2xx chips.

A board has several rails, and most are parts of another. Where one carries the whole board (VDD_IN, POM_5V_IN) that
one is counted and nothing else; on boards without such a rail, the set of rails that feeds the module side by side
(`_SIDE_BY_SIDE`: AGX Orin, AGX Xavier). Rails that nobody labelled say nothing.
Sources: the kernel's Documentation/hwmon/ina3221.rst; NVIDIA on POM_5V_IN ("the total power consumption; you don't
need to add POM_5V_GPU and POM_5V_CPU"), https://forums.developer.nvidia.com/t/power-consumption-monitoring/73608;
the device tree of the AGX Orin (VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0 on one chip; VDDQ_VDD2_1V8AO on another is taken
to be fed by VIN_SYS_5V0 and left out).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trilemma.core.measurement import Scope
from trilemma.measure.energy.sensors.power import PowerSensor
from trilemma.measure.energy.sensors.sensor import NoSensor, Sensor

HWMON = Path("/sys/class/hwmon")
IIO = Path("/sys/bus/iio/devices")
_WHOLE = re.compile(r"^(VDD_IN|POM_5V_IN|VIN|DC_IN|TOTAL)$", re.IGNORECASE)
_SIDE_BY_SIDE = (
    frozenset({"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}),
    frozenset({"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}),
)


@dataclass(frozen=True)
class Rail:
    """A supply line: a power file, or a voltage and a current file, and what their product is multiplied by to be W."""

    label: str
    files: tuple[Path, ...]
    scale: float

    def watts(self) -> float:
        value = self.scale
        for path in self.files:
            value *= int(path.read_text(encoding="ascii").strip())
        return max(value, 0.0)  # an idle rail reads a milliampere below zero now and then


def find_ina(
    hwmon: Path = HWMON, iio: Path = IIO, *, clock: Callable[[], float] = time.monotonic, poll: bool = True
) -> list[Sensor]:
    """The rail that carries the board, or those that feed it side by side; a null object with the reason where not."""
    rails = _hwmon_rails(hwmon) or _iio_rails(iio)
    if not rails:
        return [NoSensor("ina", "wall", f"no INA power monitor below {hwmon} or {iio}")]
    labelled = {rail.label: rail for rail in rails if rail.label}
    whole = [rail for label, rail in labelled.items() if _WHOLE.match(label)]
    chosen, scope = ([whole[0]], "wall") if whole else ([], "soc")
    for names in _SIDE_BY_SIDE:
        if not chosen and names <= set(labelled):
            chosen = [labelled[name] for name in sorted(names)]
    if not chosen:
        seen = ", ".join(sorted(labelled)) or f"{len(rails)} without a label"
        return [NoSensor("ina", "wall", f"rails {seen}: none is known to carry the whole board, parts do not add up")]
    return [_open(chosen, "wall" if scope == "wall" else "soc", clock, poll)]


def _open(rails: list[Rail], scope: Scope, clock: Callable[[], float], poll: bool) -> Sensor:
    labels = "+".join(rail.label for rail in rails)
    name = f"ina-{labels}"

    def watts() -> float:
        return sum(rail.watts() for rail in rails)

    try:
        watts()
    except PermissionError as error:
        return NoSensor(name, scope, f"{error.filename} may not be read; sudo chmod a+r {error.filename} allows it")
    except (OSError, ValueError) as error:
        return NoSensor(name, scope, f"{labels} can not be read: {error}")
    return PowerSensor(name, scope, watts, what=f"INA power monitor, rail {labels}", clock=clock, poll=poll)


def _hwmon_rails(root: Path) -> list[Rail]:
    found: list[Rail] = []
    for device in sorted(root.glob("*")):
        driver = _text(device / "name")
        if driver == "ina3221":
            found += [rail for channel in (1, 2, 3) if (rail := _channel(device, channel)) is not None]
        elif driver.startswith("ina"):
            label = _text(device / "label") or _text(device / "in1_label")
            if (device / "power1_input").exists():
                found.append(Rail(label, (device / "power1_input",), 1e-6))
    return found


def _channel(device: Path, channel: int) -> Rail | None:
    """One of an INA3221's three; in mV and mA. Those that are off or not connected are none."""
    label = _text(device / f"in{channel}_label")
    volts, amperes = device / f"in{channel}_input", device / f"curr{channel}_input"
    if label.upper() == "NC" or _text(device / f"in{channel}_enable") == "0":
        return None
    return Rail(label, (volts, amperes), 1e-6) if volts.exists() and amperes.exists() else None


def _iio_rails(root: Path) -> list[Rail]:
    """The driver ina3221x of NVIDIA's kernel 4.9: in_power0_input in mW beside rail_name_0."""
    found = []
    for device in sorted(root.glob("iio:device*")):
        if not _text(device / "name").startswith("ina"):
            continue
        for channel in (0, 1, 2):
            label, power = _text(device / f"rail_name_{channel}"), device / f"in_power{channel}_input"
            if power.exists() and label.upper() != "NC":
                found.append(Rail(label, (power,), 1e-3))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
