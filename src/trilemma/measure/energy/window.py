"""One window of measured work: joules by counter, idle power before it, and how far the figure can be off.

The window lasts at least 5 s and until some level of sensors (see `counting`) has moved by 50 ticks, at most ten times
as long. One that stops short of 50 ticks is marked noisy and says so; one with fewer than 5 is no measurement.
Counters are read at the ends of each of its parts; in between, they are polled only to catch wraps.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from trilemma.core.measurement import Measurement, Scope
from trilemma.measure.energy.counting import HOST, LEAST_TICKS, Level, Panel, levels, settle, ticks_of
from trilemma.measure.energy.sensors import Sensor, SensorGoneError
from trilemma.measure.stats import mean_interval

Conditions = dict[str, str | int | float]
PARTS = 5
_LONGEST = 10  # times the shortest window
_IDLE_TICKS = 10
_POLL_S = 20.0
_MOST_W = 1000.0  # of one sensor: the poller reads at least twice in the time that this takes to wrap it


@dataclass(frozen=True)
class Work:
    """Tokens that one call of the measured function handled."""

    prompt_tokens: int
    output_tokens: int


@dataclass
class _Part:
    joules: dict[str, float]
    seconds: float
    output_tokens: int
    total_tokens: int


@dataclass
class _Idle:
    joules: dict[str, float]
    seconds: float


@dataclass
class _Window:
    """What was read: joules by sensor over the whole window, and over each of its parts."""

    seconds: float
    joules: dict[str, float]
    variances: dict[str, float]
    idle: _Idle
    parts: list[_Part] = field(default_factory=list)


def measure_energy(
    run: Callable[[], Work],
    sensors: Sequence[Sensor],
    *,
    min_window_s: float = 5.0,
    idle_s: float = 2.0,
    conditions: Conditions | None = None,
    scopes: Collection[Scope] = HOST,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Measurement]:
    """Run work again and again for a window and divide joules by tokens.

    Args:
        run: one piece of work; says how many tokens it handled.
        sensors: null objects are passed over; all others are stated in the conditions.
        scopes: which of them may add up (the host's; add 'gpu' for an engine that runs there).
        min_window_s, idle_s: lengths of the window and of the idle reading before it; a coarse counter makes both
            longer, a window up to ten times and an idle reading up to five.
        clock, sleep: time, for tests.

    Returns:
        energy per output token and per token, power, idle power (unavailable where the counter is too coarse for it).

    Raises:
        SensorGoneError: a counter vanished meanwhile, stalled, or there is none.
    """
    panel = Panel(sensors)
    if not panel.live:
        raise SensorGoneError("; ".join(f"{item.name}: {item.reason}" for item in sensors) or "no sensor")
    choices = levels(panel.live, scopes)
    if not choices:
        raise SensorGoneError(f"no counter of {', '.join(scopes)}")
    found = _watch(run, panel, choices, min_window_s, idle_s, clock, sleep)
    return _figures(found, settle(choices, found.joules), panel, dict(conditions or {}))


def _watch(
    run: Callable[[], Work],
    panel: Panel,
    choices: Sequence[Level],
    min_window_s: float,
    idle_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> _Window:
    """Idle, warm up, work in parts until some level has moved enough."""
    with CounterPoller(panel.live):
        idle = _idle(panel, choices, idle_s, clock, sleep)
        run()  # warm-up
        parts: list[_Part] = []
        variances = panel.variances()
        before, began = _look(panel, clock)
        while True:
            parts.append(_part(run, panel, min_window_s / PARTS, clock))
            after, now = _look(panel, clock)
            so_far, seconds = _spent(before, after), now - began
            if not any(all(one.name in so_far for one in level.sensors) for level in choices):
                raise SensorGoneError(panel.why())
            enough = any(_ticks(level, so_far) >= LEAST_TICKS for level in choices)
            if len(parts) >= PARTS and seconds >= min_window_s and (enough or seconds > _LONGEST * min_window_s):
                break
    return _Window(seconds, so_far, _spent(variances, panel.variances()), idle, parts)


def _part(run: Callable[[], Work], panel: Panel, least_s: float, clock: Callable[[], float]) -> _Part:
    before, began = _look(panel, clock)
    output = total = 0
    while True:
        work = run()
        output += work.output_tokens
        total += work.output_tokens + work.prompt_tokens
        if clock() - began >= least_s:
            break
    after, now = _look(panel, clock)
    return _Part(_spent(before, after), now - began, output, total)


def _idle(
    panel: Panel,
    choices: Sequence[Level],
    seconds: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> _Idle:
    """Longer for a counter that moves in large steps, but not forever: a figure is not worth minutes of waiting."""
    before, began = _look(panel, clock)
    while True:
        sleep(seconds)
        after, now = _look(panel, clock)
        spent, elapsed = _spent(before, after), now - began
        if not any(all(one.name in spent for one in level.sensors) for level in choices):
            raise SensorGoneError(panel.why())
        if elapsed >= 5 * seconds or any(_ticks(level, spent) >= _IDLE_TICKS for level in choices):
            return _Idle(spent, elapsed)


def _figures(window: _Window, level: Level, panel: Panel, conditions: Conditions) -> dict[str, Measurement]:
    """Means over the parts with an interval that has the counter's own error added on both sides."""
    joules, ticks = level.joules(window.joules), level.ticks(window.joules)
    integration = 2 * math.sqrt(level.joules(window.variances))
    off = (level.tick_error_j() + integration) / joules
    output = sum(part.output_tokens for part in window.parts)
    idle_w, why_not = _idle_w(window.idle, level)
    stated = conditions | _stated(window, level, panel)
    if integration:
        stated["integration_error_j"] = integration
    if idle_w is not None:
        stated["idle_power_w"] = idle_w
        stated["idle_subtracted_j_per_output_token"] = (joules - idle_w * window.seconds) / output
    coarse = "" if ticks >= LEAST_TICKS else f"; only {ticks:.0f} of {LEAST_TICKS} ticks in the longest window"
    left_out = "; the host is not counted" if level.scope == "gpu" else ""
    series = {
        "energy_j_per_output_token": [level.joules(part.joules) / part.output_tokens for part in window.parts],
        "energy_j_per_total_token": [level.joules(part.joules) / part.total_tokens for part in window.parts],
        "power_w": [level.joules(part.joules) / part.seconds for part in window.parts],
    }
    found = {}
    for metric, samples in series.items():
        interval = mean_interval(samples)
        low, high = interval.ci95 or (interval.value, interval.value)
        found[metric] = Measurement.of(
            metric, interval.value, sensor=level.name, scope=level.scope, n=len(samples), samples=tuple(samples),
            ci95=(max(0.0, low - off * interval.value), high + off * interval.value),
            method=f"gross, {len(samples)} parts of one window, {level.method}{coarse}{left_out}",
            window_s=window.seconds, noisy=ticks < LEAST_TICKS, conditions=stated,
        )  # fmt: skip
    if idle_w is None:
        return found | {"idle_power_w": Measurement.unavailable("idle_power_w", why_not, sensor=level.name)}
    found["idle_power_w"] = Measurement.of(
        "idle_power_w", idle_w, method=f"before the work, {level.method}", sensor=level.name, scope=level.scope,
        window_s=window.idle.seconds, conditions=stated,
    )  # fmt: skip
    return found


def _stated(window: _Window, level: Level, panel: Panel) -> Conditions:
    """Every sensor one by one, counted or not."""
    found: Conditions = {f"{name}_j": joules for name, joules in window.joules.items()}
    found["scopes"] = level.scopes
    aside = [f"{one.name} ({one.scope})" for one in panel.live if one not in level.sensors]
    aside += [f"{name} ({why})" for name, why in panel.gone.items()]
    if aside:
        found["read_but_not_counted"] = ", ".join(aside)
    return found


def _idle_w(idle: _Idle, level: Level) -> tuple[float | None, str]:
    if any(sensor.name not in idle.joules for sensor in level.sensors):
        return None, f"{level.name} could not be read before the work"
    ticks = level.ticks(idle.joules)
    if ticks < _IDLE_TICKS:
        return None, f"{level.name} moved by {ticks:.0f} ticks in {idle.seconds:.1f} s of idling, {_IDLE_TICKS} needed"
    return level.joules(idle.joules) / idle.seconds, ""


def _look(panel: Panel, clock: Callable[[], float]) -> tuple[dict[str, float], float]:
    """Joules by sensor and when: reading takes its time on a busy machine, so the middle of it."""
    began = clock()
    read = panel.read()
    return read, (began + clock()) / 2


def _ticks(level: Level, joules: Mapping[str, float]) -> float:
    """As `Level.ticks`; 0 where a sensor is gone, and a DRAM zone that never moves is passed over."""
    moved = [
        ticks_of(sensor, joules.get(sensor.name, 0.0))
        for sensor in level.sensors
        if sensor.scope != "dram" or joules.get(sensor.name, 0.0) > 0
    ]
    return min(moved, default=0.0)


def _spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after if name in before}


class CounterPoller:
    """Reads the counters now and then, so that no wrap is missed in a long window."""

    def __init__(self, sensors: Sequence[Sensor]) -> None:
        self._sensors = [sensor for sensor in sensors if sensor.wrap_j is not None]
        self._period_s = min([_POLL_S, *(sensor.wrap_j / 2 / _MOST_W for sensor in self._sensors if sensor.wrap_j)])
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> CounterPoller:
        if self._sensors:
            self._thread = threading.Thread(target=self._poll, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(self._period_s):
            for sensor in self._sensors:
                try:
                    sensor.read()
                except SensorGoneError:
                    continue  # the reading at the end of the window reports it
