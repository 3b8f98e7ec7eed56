"""Builds trees of files shaped like the sysfs of real machines, and lets time and energy pass in them."""

from __future__ import annotations

RAPL_RANGE = 262_143_328_850  # uJ, of a package
DRAM_RANGE = 65_712_999_613


class Tree:
    """A made-up /sys below a folder; `clock` is its time."""

    def __init__(self, root):
        self.root, self.now = root, 1000.0
        self.powercap, self.hwmon_root = root / "class/powercap", root / "class/hwmon"
        self.supply, self.iio = root / "class/power_supply", root / "bus/iio/devices"

    def clock(self):
        return self.now

    def write(self, folder, **files):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name).write_text(f"{value}\n")
        return folder

    def zone(self, name, label, uj=0, top=RAPL_RANGE):
        return self.write(self.powercap / name, name=label, energy_uj=uj, max_energy_range_uj=top)

    def spend(self, zone, uj):
        """Counts up, and wraps as the hardware does."""
        top = int((zone / "max_energy_range_uj").read_text())
        now = int((zone / "energy_uj").read_text()) + uj
        (zone / "energy_uj").write_text(f"{now % (top + 1)}\n")

    def hwmon(self, number, driver, **files):
        return self.write(self.hwmon_root / f"hwmon{number}", name=driver, **files)

    def battery(self, name="BAT0", status="Discharging", **files):
        return self.write(self.supply / name, type="Battery", status=status, **files)

    def mains(self, online, name="AC"):
        return self.write(self.supply / name, type="Mains", online=online)

    def jetson_orin_nano(self, milliamperes=1200):
        """JetPack 6: one INA3221 with VDD_IN over two of its parts, and the sum channel."""
        return self.hwmon(
            1, "ina3221", in1_label="VDD_IN", in1_input=5000, curr1_input=milliamperes, in1_enable=1,
            in2_label="VDD_CPU_GPU_CV", in2_input=5000, curr2_input=400, in2_enable=1,
            in3_label="VDD_SOC", in3_input=5000, curr3_input=300, in3_enable=1,
            in4_input=3, in5_input=1, in6_input=1, in7_label="sum of shunt voltages", in7_input=5,
        )  # fmt: skip

    def jetson_agx_orin(self):
        """Two chips; no rail carries the whole board."""
        self.hwmon(
            3, "ina3221", in1_label="VDD_GPU_SOC", in1_input=20000, curr1_input=150,
            in2_label="VDD_CPU_CV", in2_input=20000, curr2_input=100,
            in3_label="VIN_SYS_5V0", in3_input=5000, curr3_input=900,
        )  # fmt: skip
        self.hwmon(
            4, "ina3221", in1_label="NC", in1_input=0, curr1_input=0, in2_label="VDDQ_VDD2_1V8AO", in2_input=5000,
            curr2_input=200, in3_label="NC", in3_input=0, curr3_input=0,
        )  # fmt: skip
