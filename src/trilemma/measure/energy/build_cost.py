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
from trilemma.measure.energy.counting import HOST, LEAST_TICKS, Panel, levels, settle
from trilemma.measure.energy.energy_model import DEVICES, device_class
from trilemma.measure.energy.sensors import Sensor, SensorGoneError, find_sensors
from trilemma.measure.energy.window import CounterPoller

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
        self._panel = Panel([sensor for sensor in found if sensor.scope in HOST])
        self._levels = levels(self._panel.live)
        self._device = device
        self._clock, self._cpu_clock = clock, cpu_clock
        self._poller = CounterPoller(self._panel.live)
        self._end: dict[str, Measurement] | None = None

    def __enter__(self) -> BuildMeter:
        self._joules = self._panel.read()
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
        why = "no counter was read"
        after = self._panel.read()
        spent = {name: after[name] - self._joules[name] for name in after if name in self._joules}
        try:
            level = settle(self._levels, spent)
        except SensorGoneError as error:
            why = str(error) if self._levels else why
        else:
            return Measurement.of(
                "build_energy_j", level.joules(spent), method=f"gross, counters at both ends, {level.method}",
                sensor=level.name, scope=level.scope, window_s=seconds, noisy=level.ticks(spent) < LEAST_TICKS,
            )  # fmt: skip
        power = DEVICES[self._device or device_class(cpu_name())]
        joules = power.base_w * seconds + power.core_w * cpu_s
        return Measurement.of(
            "build_energy_j", joules, source="estimated", scope="wall",
            method=f"power of the class '{power.name}' ({power.source}) over {seconds:.1f} s and {cpu_s:.1f} s of "
            f"processor time, interval x/÷ {power.factor}; {why}",
            ci95=(joules / power.factor, joules * power.factor), conditions={"device_class": power.name},
        )  # fmt: skip
