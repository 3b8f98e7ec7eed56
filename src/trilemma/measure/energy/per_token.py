"""Energy per token: read from counters where there are some, estimated and labelled so where not.

A window lasts at least 5 s and 50 ticks of the slowest counter; idle power is read before; counters
are read at the ends of each part of the window and polled in between only to catch wraps. Package
and DRAM of the host and all GPUs are stated one by one beside their sum.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from trilemma.core.device import Arithmetic
from trilemma.core.environment import cpu_name
from trilemma.core.measurement import Measurement, Scope
from trilemma.measure.energy.energy_model import DEVICES, device_class
from trilemma.measure.energy.sensors import Sensor, SensorGoneError, find_sensors
from trilemma.measure.stats import mean_interval
from trilemma.runtime.engine import Engine, SamplingSettings

ENERGY_METRICS = ("energy_j_per_output_token", "energy_j_per_total_token", "power_w", "idle_power_w")
HOST: tuple[Scope, ...] = ("package", "dram", "soc", "wall")
_PARTS = 5
_LEAST_TICKS = 50
_POLL_S = 20.0


@dataclass(frozen=True)
class Work:
    """Tokens that one call of the measured function handled."""

    prompt_tokens: int
    output_tokens: int


def energy_per_token(
    engine: Engine,
    *,
    prompt_tokens: int,
    output_tokens: int,
    read_bytes_per_token: float,
    macs_per_token: float,
    precision: Arithmetic = "f32",
    device: str | None = None,
    sensors: Sequence[Sensor] | None = None,
    min_window_s: float = 5.0,
    tpot_s: float | None = None,
    ttft_s: float | None = None,
) -> dict[str, Measurement]:
    """Energy of requests of the stated lengths on this host, by counter or by estimate.

    Args:
        engine: an open engine that runs on the CPU.
        read_bytes_per_token, macs_per_token: of one decode step (`model.cost`), for the estimate.
        precision: of the multiplications, for the estimate.
        device: class of `energy_model.DEVICES` for the estimate; by default the processor's name decides.
        sensors: by default all of this host.
        tpot_s, ttft_s: measured times for the estimate; measured here when not given.

    Returns:
        `ENERGY_METRICS`; source 'measured', or 'estimated' with an interval and the reason in `method`.
    """
    found = list(sensors) if sensors is not None else find_sensors()
    request = _request(engine, prompt_tokens, output_tokens)
    conditions: dict[str, str | int | float] = {
        "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "threads": engine.threads,
        "kv_cache": engine.kv_cache,
    }  # fmt: skip
    why = "; ".join(f"{sensor.name}: {sensor.reason}" for sensor in found if sensor.reason) or "no counter"
    if any(sensor.scope in ("package", "soc", "wall") and not sensor.reason for sensor in found):
        try:
            return measure_energy(request, found, min_window_s=min_window_s, conditions=conditions)
        except SensorGoneError as error:
            why = str(error)
    if tpot_s is None or ttft_s is None:
        times = engine.generate([1] * prompt_tokens, _settings(output_tokens)).token_times_s
        tpot_s, ttft_s = (times[-1] - times[0]) / (len(times) - 1), times[0]
    return estimate_energy(
        seconds=ttft_s + tpot_s * (output_tokens - 1), tokens=Work(prompt_tokens, output_tokens),
        cores=engine.threads, read_bytes=read_bytes_per_token * output_tokens,
        macs=macs_per_token * (prompt_tokens + output_tokens), precision=precision, device=device,
        reason=why, conditions=conditions,
    )  # fmt: skip


def measure_energy(
    run: Callable[[], Work],
    sensors: Sequence[Sensor],
    *,
    min_window_s: float = 5.0,
    idle_s: float = 2.0,
    conditions: dict[str, str | int | float] | None = None,
    scopes: Collection[Scope] = HOST,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Measurement]:
    """Run work again and again for a window and divide joules by tokens.

    Args:
        run: one piece of work; says how many tokens it handled.
        sensors: null objects are passed over; all others are stated in the conditions.
        scopes: which of them add up (the host's; add 'gpu' for an engine that runs there).
        min_window_s, idle_s: lengths of the window and of the idle reading before it.
        clock, sleep: time, for tests.

    Raises:
        SensorGoneError: a counter vanished meanwhile, or there is none.
    """
    active = [sensor for sensor in sensors if sensor.reason is None]
    if not active:
        raise SensorGoneError("; ".join(f"{item.name}: {item.reason}" for item in sensors) or "no sensor")
    counted = [sensor for sensor in active if sensor.scope in scopes]
    if not counted:
        raise SensorGoneError(f"no counter of {', '.join(scopes)}")
    idle_w = _idle_power(counted, idle_s, clock, sleep)
    run()  # warm-up
    parts: list[_Part] = []
    with CounterPoller(active):
        began, before = clock(), _read(active)
        while len(parts) < _PARTS or clock() - began < min_window_s or not _enough_ticks(counted, parts):
            parts.append(_part(run, counted, min_window_s / _PARTS, clock))
            if clock() - began > 10 * min_window_s and len(parts) >= _PARTS:
                break
        after, window = _read(active), clock() - began
    joules = {sensor.name: after[sensor.name] - before[sensor.name] for sensor in active}
    stated = {**(conditions or {}), **{f"{name}_j": value for name, value in joules.items()}, "idle_power_w": idle_w}
    return _measured(parts, window, idle_w, counted, stated)


def estimate_energy(
    *,
    seconds: float,
    tokens: Work,
    cores: int,
    read_bytes: float,
    macs: float,
    precision: Arithmetic = "f32",
    device: str | None = None,
    reason: str = "",
    conditions: dict[str, str | int | float] | None = None,
) -> dict[str, Measurement]:
    """The formula of `energy_model` as measurements with source 'estimated'. idle_power_w is unavailable."""
    constants = DEVICES[device or device_class(cpu_name())]
    work = {"seconds": seconds, "read_bytes": read_bytes, "macs": macs}
    total = constants.joules(cores=cores, precision=precision, **work)
    terms = {
        f"{name}_j_per_output_token": constants.joules(
            cores=cores, precision=precision, **{key: value if key == name else 0.0 for key, value in work.items()}
        )
        / tokens.output_tokens
        for name in work
    }
    method = (
        f"estimated for the class '{constants.name}': P x t + bytes + MACs ({constants.source}), interval x/÷ "
        f"{constants.factor}. No counter was read ({reason or 'none asked'})"
    )
    stated = {**(conditions or {}), "device_class": constants.name, "seconds": seconds, **terms}

    def record(metric: str, value: float) -> Measurement:
        interval = (value / constants.factor, value * constants.factor)
        return Measurement.of(
            metric, value, source="estimated", method=method, scope="package", ci95=interval, conditions=stated
        )

    return {
        "energy_j_per_output_token": record("energy_j_per_output_token", total / tokens.output_tokens),
        "energy_j_per_total_token": record(
            "energy_j_per_total_token", total / (tokens.output_tokens + tokens.prompt_tokens)
        ),
        "power_w": record("power_w", total / seconds),
        "idle_power_w": Measurement.unavailable("idle_power_w", reason or "no counter"),
    }


@dataclass(frozen=True)
class _Part:
    joules: float
    seconds: float
    output_tokens: int
    total_tokens: int


def _part(run: Callable[[], Work], sensors: list[Sensor], least_s: float, clock: Callable[[], float]) -> _Part:
    before, began = _read(sensors), clock()
    output = total = 0
    while True:
        work = run()
        output += work.output_tokens
        total += work.output_tokens + work.prompt_tokens
        if clock() - began >= least_s:
            break
    seconds, after = clock() - began, _read(sensors)
    return _Part(sum(after[name] - before[name] for name in after), seconds, output, total)


def _measured(
    parts: list[_Part],
    window_s: float,
    idle_w: float,
    sensors: list[Sensor],
    conditions: dict[str, str | int | float],
) -> dict[str, Measurement]:
    name = "+".join(sensor.name for sensor in sensors)
    series = {
        "energy_j_per_output_token": [part.joules / part.output_tokens for part in parts],
        "energy_j_per_total_token": [part.joules / part.total_tokens for part in parts],
        "power_w": [part.joules / part.seconds for part in parts],
    }
    output = sum(part.output_tokens for part in parts)
    net = sum(part.joules - idle_w * part.seconds for part in parts) / output
    found = {}
    for metric, samples in series.items():
        interval = mean_interval(samples)
        found[metric] = Measurement.of(
            metric, interval.value, method=f"gross, {len(parts)} parts of one window", sensor=name, scope="package",
            ci95=interval.ci95, n=len(parts), samples=tuple(samples), window_s=window_s,
            conditions={**conditions, "idle_subtracted_j_per_output_token": net},
        )  # fmt: skip
    found["idle_power_w"] = Measurement.of(
        "idle_power_w", idle_w, method="before the work", sensor=name, scope="package", conditions=conditions
    )
    return found


def _idle_power(
    sensors: list[Sensor], seconds: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> float:
    before, began = _read(sensors), clock()
    sleep(seconds)
    after, elapsed = _read(sensors), clock() - began
    return sum(after[name] - before[name] for name in after) / elapsed


def _enough_ticks(sensors: list[Sensor], parts: list[_Part]) -> bool:
    coarsest = max(sensor.resolution_j for sensor in sensors)
    return sum(part.joules for part in parts) >= _LEAST_TICKS * coarsest


def _read(sensors: list[Sensor]) -> dict[str, float]:
    return {sensor.name: sensor.read() for sensor in sensors}


def _settings(output_tokens: int) -> SamplingSettings:
    return SamplingSettings(max_tokens=output_tokens, ignore_eos=True)


def _request(engine: Engine, prompt_tokens: int, output_tokens: int) -> Callable[[], Work]:
    prompt = [1 + index % max(1, engine.config.vocab_size - 1) for index in range(prompt_tokens)]

    def run() -> Work:
        generation = engine.generate(prompt, _settings(output_tokens))
        return Work(prompt_tokens, len(generation.tokens))

    return run


class CounterPoller:
    """Reads the counters now and then, so that no wrap is missed in a long window."""

    def __init__(self, sensors: list[Sensor]) -> None:
        self._sensors = [sensor for sensor in sensors if sensor.wrap_j is not None]
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
        while not self._stop.wait(_POLL_S):
            try:
                _read(self._sensors)
            except SensorGoneError:
                return  # the reading at the end of the window reports it
