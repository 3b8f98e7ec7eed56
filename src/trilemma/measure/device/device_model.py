"""What a model costs on a device that is not here: a roofline over its profile, and energy by the formula of
`energy_model`. Plain arithmetic on counted bytes and multiply-accumulates; nothing is opened or timed.

    decode  = max(bytes / sustained bandwidth, sum of MACs / rate by precision) + overhead, a token
    prefill = max(weight bytes / bandwidth, prompt x MACs / rate) + overhead
    energy  = active_w x t + byte_pj x bytes + mac_pj x MACs

Every prediction is an estimate with the interval that the profile's factors give: those cover all published cases
that were found (`devices/published.yaml`), which is more than a confidence statement about other runtimes: kernels
that dequantize, or a hot phone, can lie outside. Models far smaller than any published case get wider ones.
Left out: caches that hold a whole small model, several requests at once, throttling, accelerators.
"""

from __future__ import annotations

from collections.abc import Mapping

from trilemma.core.device import Arithmetic, Device
from trilemma.core.duty import DutyCycle, battery_hours
from trilemma.core.measurement import Measurement
from trilemma.core.record import Record
from trilemma.measure.energy.energy_model import work_energy_j

Macs = Mapping[Arithmetic, float]
BOUND = ("memory", "compute", "overhead")


class Demand(Record):
    """What one model asks of any device, at stated lengths.

    weights_bytes: all of them, resident; kv_bytes: the cache at the full length; read_bytes: of one decode step at
    the middle of the answer (active experts only, cache included); macs: of that step by precision;
    prefill_bytes, prefill_macs: of the whole prompt.
    """

    prompt_tokens: int
    output_tokens: int
    weights_bytes: float
    kv_bytes: float
    read_bytes: float
    macs: dict[Arithmetic, float]
    prefill_bytes: float
    prefill_macs: dict[Arithmetic, float]


class Forecast(Record):
    """Predicted cost of one form of a model on a device.

    bound, prefill_bound: what they wait for: 'memory', 'compute' or 'overhead'; measurements: by metric, all
    estimated (bytes are counted); load_s: reading the weights from storage.
    """

    fits: bool
    needed_bytes: float
    usable_bytes: float
    bound: str
    prefill_bound: str = "compute"
    load_s: float
    measurements: dict[str, Measurement]


def decode_seconds(device: Device, read_bytes: float, macs: Macs) -> tuple[float, str]:
    """Seconds of one decode step, and what it waits for."""
    memory = read_bytes / device.sustained_bytes_per_s
    compute = sum(count / device.macs_per_s[precision].value for precision, count in macs.items())
    overhead = device.overhead_s.value
    bound = max(zip((memory, compute, overhead), BOUND, strict=True))[1]
    return max(memory, compute) + overhead, bound


def joules(device: Device, *, seconds: float, read_bytes: float, macs: Macs) -> float:
    """Energy of the whole device while it works: idle power is part of `active_w`."""
    return work_energy_j(
        power_w=device.active_w.value, seconds=seconds, byte_pj=device.byte_pj.value, read_bytes=read_bytes,
        mac_pj={precision: figure.value for precision, figure in device.mac_pj.items()}, macs=macs,
    )  # fmt: skip


class Times(Record):
    """Times that are known better than by the roofline (`step_time`): seconds, what decode and prefill wait for, and
    the interval's factors; `method` in words."""

    tpot_s: float
    ttft_s: float
    bound: str
    prefill_bound: str
    decode_factor: float
    prefill_factor: float
    method: str


def roofline(device: Device, demand: Demand) -> Times:
    """Times by bytes and arithmetic alone, with the factors of the profile."""
    tpot_s, bound = decode_seconds(device, demand.read_bytes, demand.macs)
    ttft_s, prefill_bound = decode_seconds(device, demand.prefill_bytes, demand.prefill_macs)
    wider = device.widening(demand.read_bytes)
    return Times(
        tpot_s=tpot_s, ttft_s=ttft_s, bound=bound, prefill_bound=prefill_bound,
        decode_factor=wider * device.decode_factor.value, prefill_factor=wider * device.prefill_factor.value,
        method=f"roofline and power of the profile '{device.name}', which assumes {device.runtime}",
    )  # fmt: skip


def forecast(device: Device, demand: Demand, duty: DutyCycle | None = None, times: Times | None = None) -> Forecast:
    """Memory fit, times, energy and battery hours of a model on a device.

    Args:
        duty: how often it answers; without it battery hours are those of answering without a pause.
        times: known better than by the roofline, where the profile has kernel times.
    """
    times = times or roofline(device, demand)
    tpot_s, ttft_s = times.tpot_s, times.ttft_s
    steps = max(demand.output_tokens - 1, 0)
    request_s = ttft_s + tpot_s * steps
    macs = {p: demand.prefill_macs.get(p, 0.0) + steps * demand.macs.get(p, 0.0) for p in device.mac_pj}
    request_j = joules(
        device, seconds=request_s, read_bytes=demand.prefill_bytes + steps * demand.read_bytes, macs=macs
    )
    needed = demand.weights_bytes + demand.kv_bytes
    energy_j, seconds = request_j / demand.output_tokens, request_s / demand.output_tokens
    state = _State(device, demand, times.method)
    decode, prefill = times.decode_factor, times.prefill_factor
    power = device.widening(demand.read_bytes) * device.energy_factor.value
    found = [
        state.record("tpot_s", tpot_s, decode),
        state.record("ttft_s", ttft_s, prefill),
        state.record("decode_tokens_per_s", 1 / tpot_s, decode),
        state.record("prefill_tokens_per_s", demand.prompt_tokens / ttft_s, prefill),
        state.record("energy_j_per_output_token", energy_j, power),
        state.record("power_w", request_j / request_s, power),
        _battery(state, duty, energy_j, seconds, power),
    ]
    return Forecast(
        fits=needed <= device.usable_bytes.value, needed_bytes=needed, usable_bytes=device.usable_bytes.value,
        bound=times.bound, prefill_bound=times.prefill_bound,
        load_s=demand.weights_bytes / device.storage_bytes_per_s.value,
        measurements={item.metric: item for item in found},
    )  # fmt: skip


def _battery(
    state: _State, duty: DutyCycle | None, energy_j: float, seconds_per_token: float, factor: float
) -> Measurement:
    """Hours of a full battery, screen and radio aside; the interval follows the energy's."""
    device = state.device
    if device.battery_wh is None:
        return Measurement.unavailable("battery_h", f"{device.name} has no battery")
    duty = duty or DutyCycle(text="100%", share=1.0)
    share = duty.busy_share(seconds_per_token)
    if share > 1:
        most = 3600 / seconds_per_token
        return Measurement.unavailable(
            "battery_h", f"{device.name} makes at most {most:,.0f} tokens/h of this, not the {duty.text} asked for"
        )

    def hours(scale: float) -> float:
        assert device.battery_wh is not None
        idle_w = device.idle_w.value
        busy_w = max(scale * energy_j / seconds_per_token, idle_w)
        return battery_hours(battery_wh=device.battery_wh.value, idle_w=idle_w, busy_w=busy_w, busy_share=share)

    more: dict[str, str | int | float] = {"duty_cycle": duty.text, "busy_share": share, "idle_w": device.idle_w.value}
    return state.record("battery_h", hours(1.0), 1.0, interval=(hours(factor), hours(1 / factor)), more=more)


class _State:
    """What every record of one forecast says of itself."""

    def __init__(self, device: Device, demand: Demand, method: str) -> None:
        self.device, self.method = device, method
        self.conditions: dict[str, str | int | float] = {
            "device": device.name, "prompt_tokens": demand.prompt_tokens, "output_tokens": demand.output_tokens,
            "read_bytes": demand.read_bytes,
        }  # fmt: skip

    def record(
        self,
        metric: str,
        value: float,
        factor: float,
        *,
        interval: tuple[float, float] | None = None,
        more: Mapping[str, str | int | float] | None = None,
    ) -> Measurement:
        return Measurement.of(
            metric, value, source="estimated", scope="wall",
            method=self.method, ci95=interval or (value / factor, value * factor),
            conditions={**self.conditions, **(more or {})},
        )  # fmt: skip
