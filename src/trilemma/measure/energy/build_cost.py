"""What building a model costs: seconds, and joules by counter where there is one, else by the power model.

    with BuildMeter() as meter:
        ...
    meter.results()["build_energy_j"]

Estimated energy is base power for the wall time and a core's power for the processor time of this process, so work
that waits costs less; what memory and arithmetic add is within the interval. Other processes count only in a counter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from trilemma.core.environment import cpu_name
from trilemma.core.measurement import Measurement
from trilemma.measure.energy.energy_model import DEVICES, device_class
from trilemma.measure.energy.per_token import HOST, CounterPoller
from trilemma.measure.energy.sensors import Sensor, SensorGoneError, find_sensors

BUILD_METRICS = ("build_s", "build_energy_j")


class BuildMeter:
    """Measures what happens between entering and leaving; `results` also works before leaving.

    Args:
        sensors: by default those of this host that count the processor or the whole machine.
        device: class of `energy_model.DEVICES` for the estimate; by default the processor's name decides.
        clock, cpu_clock: time, for tests.
    """

    def __init__(
        self,
        *,
        sensors: Sequence[Sensor] | None = None,
        device: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        found = find_sensors() if sensors is None else sensors
        self._sensors = [sensor for sensor in found if sensor.reason is None and sensor.scope in HOST]
        self._device = device
        self._clock, self._cpu_clock = clock, cpu_clock
        self._poller = CounterPoller(self._sensors)
        self._end: dict[str, Measurement] | None = None

    def __enter__(self) -> BuildMeter:
        self._joules = self._read()
        self._began, self._cpu_began = self._clock(), self._cpu_clock()
        self._poller.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._poller.__exit__(kind, error, trace)
        self._end = self._now()

    def results(self) -> dict[str, Measurement]:
        """`BUILD_METRICS` so far, or as they were on leaving."""
        return self._end or self._now()

    def _now(self) -> dict[str, Measurement]:
        seconds, cpu_s = self._clock() - self._began, self._cpu_clock() - self._cpu_began
        wall = Measurement.of("build_s", seconds, method="wall clock of building and writing", scope="wall")
        return {"build_s": wall, "build_energy_j": self._energy(seconds, cpu_s)}

    def _energy(self, seconds: float, cpu_s: float) -> Measurement:
        after = self._read()
        if self._joules and after:
            spent = sum(after[name] - self._joules[name] for name in after)
            sensor = "+".join(after)
            return Measurement.of(
                "build_energy_j", spent, method="gross, counters at both ends", sensor=sensor, scope="package",
                window_s=seconds,
            )  # fmt: skip
        power = DEVICES[self._device or device_class(cpu_name())]
        joules = power.base_w * seconds + power.core_w * cpu_s
        return Measurement.of(
            "build_energy_j", joules, source="estimated", scope="package",
            method=f"power of the class '{power.name}' ({power.source}) over {seconds:.1f} s and {cpu_s:.1f} s of "
            f"processor time, interval x/÷ {power.factor}; no counter was read",
            ci95=(joules / power.factor, joules * power.factor), conditions={"device_class": power.name},
        )  # fmt: skip

    def _read(self) -> dict[str, float]:
        try:
            return {sensor.name: sensor.read() for sensor in self._sensors}
        except SensorGoneError:
            return {}
