"""Energy per token where there is no counter: a physical formula with wide, stated intervals.

    E = P x t + e_byte x bytes + e_mac x MACs

t is measured; bytes and MACs are counted; P (power of the cores in use beyond the memory's and the
arithmetic's own share) and the energies per operation are constants of a device class. Fitting them
on counters of the same host would narrow the interval; this file does not do that.

Sources of the constants:
- MACs: Horowitz, "Computing's energy problem", ISSCC 2014 (45 nm: fp32 multiply-add 4.6 pJ, fp16 1.5,
  int8 0.23), halved for current nodes.
- DRAM per byte: DDR4 15-20 pJ/bit, LPDDR4/5 4-6 pJ/bit (the same talk gives 160 pJ/byte for DDR).
- P is assumed from published power limits and fitted on no counter, hence the wide factors: a server
  core's share of its package (225 W over 64 cores, and as much again for uncore and regulators at
  partial load), a laptop's package limits (15-28 W), a Raspberry Pi 4/5 under load (6-8 W), a phone's
  sustained power (3-5 W).
"""

from __future__ import annotations

import re

from trilemma.core.device import Arithmetic
from trilemma.core.record import Record


class DeviceEnergy(Record):
    """Constants of a class of devices. `factor` spans the interval: [E / factor, E x factor]."""

    name: str
    base_w: float
    core_w: float
    byte_pj: float
    mac_pj: dict[Arithmetic, float]
    factor: float
    source: str

    def joules(self, *, seconds: float, cores: int, read_bytes: float, macs: float, precision: Arithmetic) -> float:
        """Energy of work that took `seconds` on `cores`, read `read_bytes` and did `macs` multiply-accumulates."""
        static = (self.base_w + self.core_w * cores) * seconds
        return static + (self.byte_pj * read_bytes + self.mac_pj[precision] * macs) * 1e-12


_MAC: dict[Arithmetic, float] = {"f32": 2.3, "bf16": 0.75, "int8": 0.12}

DEVICES: dict[str, DeviceEnergy] = {
    device.name: device
    for device in (
        DeviceEnergy(name="server", base_w=3.0, core_w=5.0, byte_pj=140, mac_pj=_MAC, factor=2.5,
                     source="share of a 225 W, 64-core package for the cores in use; DDR4 17.5 pJ/bit"),
        DeviceEnergy(name="laptop", base_w=4.0, core_w=4.0, byte_pj=80, mac_pj=_MAC, factor=2.0,
                     source="15-28 W packages; DDR4/LPDDR4 10 pJ/bit"),
        DeviceEnergy(name="board", base_w=2.7, core_w=1.0, byte_pj=48, mac_pj=_MAC, factor=2.0,
                     source="Raspberry Pi 4/5: 2.7 W idle, 6-8 W on four cores; LPDDR4 6 pJ/bit"),
        DeviceEnergy(name="phone", base_w=0.8, core_w=0.9, byte_pj=36, mac_pj=_MAC, factor=2.5,
                     source="3-5 W sustained on four big cores; LPDDR5 4.5 pJ/bit"),
    )
}  # fmt: skip


def device_class(cpu: str) -> str:
    """The class that a processor's name suggests; 'laptop' when it says nothing."""
    if re.search(r"EPYC|Xeon|Threadripper|Neoverse|Graviton|Ampere Altra", cpu, re.IGNORECASE):
        return "server"
    if re.search(r"Raspberry|BCM2|Rockchip|RK3|Cortex|Jetson|Tegra", cpu, re.IGNORECASE):
        return "board"
    if re.search(r"Snapdragon|Exynos|Dimensity|Kirin|Tensor G", cpu, re.IGNORECASE):
        return "phone"
    return "laptop"
