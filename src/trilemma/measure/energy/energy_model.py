"""Energy per token where there is no counter: a physical formula with wide, stated intervals.

    E = P x t + e_byte x bytes + e_mac x MACs

t is measured; bytes and MACs are counted; P and the energies per operation are constants of a class of devices, or of
the profile of one (`core/device.py`). This is the formula's only home: the prediction for devices that are not here
(`measure/device`) asks it too.

The constants and where each is from stand in `trilemma/devices/energy_classes.yaml`; what was published, what of it
they were fitted on and what was held out in `published_energy.yaml` beside it; `published.py` fits and checks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files

import yaml
from pydantic import Field

from trilemma.core.device import Arithmetic, Figure, Source
from trilemma.core.record import Record


def work_energy_j(
    *,
    power_w: float,
    seconds: float,
    byte_pj: float,
    read_bytes: float,
    mac_pj: Mapping[Arithmetic, float],
    macs: Mapping[Arithmetic, float],
) -> float:
    """The formula, in joules.

    Args:
        power_w: of the machine at work, without what memory and arithmetic take for each operation.
        byte_pj, mac_pj: picojoules of a byte from memory, and of a multiply-accumulate by precision.
    """
    arithmetic = sum(mac_pj[precision] * count for precision, count in macs.items())
    return power_w * seconds + 1e-12 * (byte_pj * read_bytes + arithmetic)


class DeviceEnergy(Record):
    """Constants of a class of devices. `factor` spans the interval: [E / factor, E x factor].

    base_w: the machine beside its busy cores; core_w: a busy core with its share of caches, regulators and supply.
    """

    name: str
    base_w: float
    core_w: float
    byte_pj: float
    mac_pj: dict[Arithmetic, float]
    factor: float
    source: str

    def joules(self, *, seconds: float, cores: int, read_bytes: float, macs: float, precision: Arithmetic) -> float:
        """Energy of work that took `seconds` on `cores`, read `read_bytes` and did `macs` multiply-accumulates."""
        return work_energy_j(
            power_w=self.base_w + self.core_w * cores, seconds=seconds, byte_pj=self.byte_pj, read_bytes=read_bytes,
            mac_pj=self.mac_pj, macs={precision: macs},
        )  # fmt: skip


class EnergyClass(Record):
    """One class as it stands in the file: every constant with where it is from; `pattern` finds it by processor."""

    title: str
    pattern: str
    base_w: Figure
    core_w: Figure
    byte_pj: Figure
    factor: Figure


class EnergyClasses(Record):
    """The file `energy_classes.yaml`."""

    version: int = Field(ge=1, le=1)
    sources: dict[str, Source]
    mac_pj: dict[Arithmetic, Figure]
    classes: dict[str, EnergyClass]


def read_classes() -> EnergyClasses:
    """The shipped constants with their sources."""
    text = (files("trilemma") / "devices" / "energy_classes.yaml").read_text(encoding="utf-8")
    return EnergyClasses.model_validate(yaml.safe_load(text))


_FILE = read_classes()
DEVICES: dict[str, DeviceEnergy] = {
    name: DeviceEnergy(
        name=name, base_w=one.base_w.value, core_w=one.core_w.value, byte_pj=one.byte_pj.value,
        mac_pj={precision: figure.value for precision, figure in _FILE.mac_pj.items()},
        factor=one.factor.value, source=one.title,
    )
    for name, one in _FILE.classes.items()
}  # fmt: skip


def device_class(cpu: str) -> str:
    """The class that a processor's name suggests; 'laptop' when it says nothing."""
    for name, one in _FILE.classes.items():
        if one.pattern and re.search(one.pattern, cpu, re.IGNORECASE):
            return name
    return "laptop"
