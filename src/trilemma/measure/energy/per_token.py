"""Energy per token of an engine: read from counters where there are some, estimated and labelled so where not.

An engine on a GPU is counted with all GPUs; no estimate stands in for those, since the constants are of processors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trilemma.core.device import Arithmetic
from trilemma.core.measurement import Measurement, Scope
from trilemma.measure.energy.counting import HOST, levels
from trilemma.measure.energy.estimate import estimate_energy
from trilemma.measure.energy.sensors import Sensor, SensorGoneError, find_sensors
from trilemma.measure.energy.window import Conditions, CounterPoller, Work, measure_energy
from trilemma.runtime.engine import Engine, SamplingSettings

__all__ = [
    "ENERGY_METRICS", "HOST", "CounterPoller", "Work", "energy_per_token", "estimate_energy", "measure_energy",
]  # fmt: skip

ENERGY_METRICS = ("energy_j_per_output_token", "energy_j_per_total_token", "power_w", "idle_power_w")


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
        engine: an open engine; one whose attribute `device` names a GPU is counted with the GPUs.
        read_bytes_per_token, macs_per_token: of one decode step (`model.cost`), for the estimate.
        precision: of the multiplications, for the estimate.
        device: class of `energy_model.DEVICES` for the estimate; by default the processor's name decides.
        sensors: by default all of this host.
        tpot_s, ttft_s: measured times for the estimate; measured here when not given.

    Returns:
        `ENERGY_METRICS`; source 'measured', or 'estimated' with an interval and the reason in `method`; 'unavailable'
        for an engine on a GPU that nothing counts.
    """
    found = list(sensors) if sensors is not None else find_sensors()
    request = _request(engine, prompt_tokens, output_tokens)
    gpu = _gpu(engine)
    scopes: tuple[Scope, ...] = (*HOST, "gpu") if gpu else HOST
    conditions: Conditions = {
        "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "threads": engine.threads,
        "kv_cache": engine.kv_cache, **({"device": gpu} if gpu else {}),
    }  # fmt: skip
    why = "; ".join(f"{sensor.name}: {sensor.reason}" for sensor in found if sensor.reason) or "no counter"
    if levels(found, scopes):
        try:
            return measure_energy(request, found, min_window_s=min_window_s, conditions=conditions, scopes=scopes)
        except SensorGoneError as error:
            why = str(error)
    if gpu:
        reason = f"the engine runs on {gpu}, which no counter covers ({why}); the estimate knows processors only"
        return {metric: Measurement.unavailable(metric, reason) for metric in ENERGY_METRICS}
    if tpot_s is None or ttft_s is None:
        times = engine.generate([1] * prompt_tokens, _settings(output_tokens)).token_times_s
        tpot_s, ttft_s = (times[-1] - times[0]) / (len(times) - 1), times[0]
    return estimate_energy(
        seconds=ttft_s + tpot_s * (output_tokens - 1), tokens=Work(prompt_tokens, output_tokens),
        cores=engine.threads, read_bytes=read_bytes_per_token * output_tokens,
        macs=macs_per_token * (prompt_tokens + output_tokens), precision=precision, device=device,
        reason=why, conditions=conditions,
    )  # fmt: skip


def _gpu(engine: Engine) -> str:
    """'cuda:0' of an engine there; '' of one on the processor."""
    device = str(getattr(engine, "device", None) or "cpu")
    return "" if device.partition(":")[0] == "cpu" else device


def _settings(output_tokens: int) -> SamplingSettings:
    return SamplingSettings(max_tokens=output_tokens, ignore_eos=True)


def _request(engine: Engine, prompt_tokens: int, output_tokens: int) -> Callable[[], Work]:
    prompt = [1 + index % max(1, engine.config.vocab_size - 1) for index in range(prompt_tokens)]

    def run() -> Work:
        generation = engine.generate(prompt, _settings(output_tokens))
        return Work(prompt_tokens, len(generation.tokens))

    return run
