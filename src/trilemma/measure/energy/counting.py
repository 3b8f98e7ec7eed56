"""Which of a host's sensors make up one sum in which no joule is counted twice.

Sensors overlap: a battery feeds the package that RAPL counts, VDD_IN the rails beside it. So there are levels, the
widest first: wall (battery, VDD_IN, a metered supply), soc, package with its DRAM; one of them is counted, all are
stated. Of two sources of one scope (RAPL, hwmon) the finer is taken. GPUs count only where the engine runs on one, and
not beside a wall that feeds them.

Counted is the widest level whose sensors all moved by 50 ticks. So a battery gauge, which takes minutes for that, does
not spoil a window of seconds in which RAPL moved a million times.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from trilemma.core.measurement import Scope
from trilemma.measure.energy.sensors import Sensor, SensorGoneError
from trilemma.measure.energy.sensors.sensor import method_of, source_of, variance_of

HOST: tuple[Scope, ...] = ("package", "dram", "soc", "wall")
LEAST_TICKS = 50
FEWEST_TICKS = 5  # below, a fifth of the figure would be guessed
_FINEST = ("rapl", "hwmon", "ina", "battery")


@dataclass(frozen=True)
class Level:
    """Sensors whose joules add up; `scope` is what they cover of the host."""

    scope: Scope
    sensors: tuple[Sensor, ...]

    @property
    def name(self) -> str:
        return "+".join(sensor.name for sensor in self.sensors)

    @property
    def scopes(self) -> str:
        return "+".join(dict.fromkeys(sensor.scope for sensor in self.sensors))

    @property
    def method(self) -> str:
        return ", ".join(dict.fromkeys(method_of(sensor) for sensor in self.sensors))

    def joules(self, read: Mapping[str, float]) -> float:
        """Their sum, from joules by sensor."""
        return sum(read[sensor.name] for sensor in self.sensors)

    def ticks(self, read: Mapping[str, float]) -> float:
        """Of the sensor that moved by the fewest."""
        return min(ticks_of(sensor, read[sensor.name]) for sensor in self.sensors)

    def tick_error_j(self) -> float:
        """Two readings that are each cut to a tick differ from the truth by up to one, in each sensor."""
        return sum(sensor.resolution_j for sensor in self.sensors)


class Panel:
    """Sensors that are read together; those that vanish are set aside with the reason."""

    def __init__(self, sensors: Sequence[Sensor]) -> None:
        self.live = [sensor for sensor in sensors if sensor.reason is None]
        self.gone: dict[str, str] = {}

    def read(self) -> dict[str, float]:
        """Joules by sensor, of those that can still be read."""
        found = {}
        for sensor in list(self.live):
            try:
                found[sensor.name] = sensor.read()
            except SensorGoneError as error:
                self.gone[sensor.name] = str(error)
                self.live.remove(sensor)
        return found

    def variances(self) -> dict[str, float]:
        """Of what was integrated so far, in J^2, by sensor."""
        return {sensor.name: variance_of(sensor) for sensor in self.live}

    def why(self) -> str:
        return "; ".join(self.gone.values())


def ticks_of(sensor: Sensor, joules: float) -> float:
    """How many of its steps a sensor moved."""
    if joules <= 0:
        return 0.0
    return joules / sensor.resolution_j if sensor.resolution_j > 0 else float("inf")


def levels(sensors: Sequence[Sensor], scopes: Collection[Scope] = HOST) -> list[Level]:
    """Sums without overlap, the widest first; empty where nothing covers the processor.

    Args:
        sensors: of a host; null objects are passed over.
        scopes: which may be counted; with 'gpu' every level has all GPUs in it, and where no counter covers the host
            the GPUs alone are the last level.
    """
    active = [sensor for sensor in sensors if sensor.reason is None and sensor.scope in scopes]
    gpus = tuple(sensor for sensor in active if sensor.scope == "gpu")
    found = [Level("wall", wall)] if (wall := _finest(active, "wall")) else []
    if "gpu" in scopes and not gpus:
        return found
    if soc := _finest(active, "soc"):
        found.append(Level("soc", soc + gpus))
    if package := _finest(active, "package"):
        found.append(Level("package", package + _finest(active, "dram") + gpus))
    if gpus:
        found.append(Level("gpu", gpus))
    return found


def settle(choices: Sequence[Level], joules: Mapping[str, float]) -> Level:
    """The widest level that moved by 50 ticks, else the one that moved by the most.

    Args:
        choices: as `levels` gives them; those with a sensor that is not in `joules` are passed over.
        joules: what each sensor counted.

    Raises:
        SensorGoneError: none moved, or by too few ticks for any figure.
    """
    there = [_without_idle_dram(one, joules) for one in choices if all(each.name in joules for each in one.sensors)]
    if not there:
        raise SensorGoneError("no counter is left")
    for level in there:
        if level.ticks(joules) >= LEAST_TICKS:
            return level
    best = max(there, key=lambda level: level.ticks(joules))
    ticks = best.ticks(joules)
    if ticks == 0:
        raise SensorGoneError(f"{best.name} did not move: the counter stalls, so it can not be believed")
    if ticks < FEWEST_TICKS:
        coarse = max(sensor.resolution_j for sensor in best.sensors)
        raise SensorGoneError(
            f"{best.name} moved by {ticks:.1f} ticks of {coarse:.3g} J, {LEAST_TICKS} are needed: "
            f"measure about {LEAST_TICKS / ticks:.0f} times as long"
        )
    return best


def _finest(sensors: Sequence[Sensor], scope: Scope) -> tuple[Sensor, ...]:
    """All of one source, as those of two may see the same joules."""
    fitting = [sensor for sensor in sensors if sensor.scope == scope]
    if not fitting:
        return ()
    sources = {source_of(sensor) for sensor in fitting}
    best = min(sources, key=lambda name: (_FINEST.index(name) if name in _FINEST else -1, name))
    return tuple(sensor for sensor in fitting if source_of(sensor) == best)


def _without_idle_dram(level: Level, joules: Mapping[str, float]) -> Level:
    """Client chips offer a DRAM zone that never moves; the package beside it is right all the same."""
    moved = tuple(sensor for sensor in level.sensors if sensor.scope != "dram" or joules[sensor.name] > 0)
    return Level(level.scope, moved) if moved else level
