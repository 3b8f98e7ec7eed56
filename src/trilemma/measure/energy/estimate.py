"""Energy without a counter: the formula of `energy_model` on measured times and counted work, labelled so."""

from __future__ import annotations

from trilemma.core.device import Arithmetic
from trilemma.core.environment import cpu_name
from trilemma.core.measurement import Measurement
from trilemma.measure.energy.energy_model import DEVICES, device_class
from trilemma.measure.energy.window import Conditions, Work


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
    conditions: Conditions | None = None,
) -> dict[str, Measurement]:
    """The formula of `energy_model` as measurements with source 'estimated'. idle_power_w is unavailable.

    Args:
        seconds: that the work took, measured.
        cores: threads at work.
        read_bytes, macs: of all of it.
        device: class of `energy_model.DEVICES`; by default the processor's name decides.
        reason: why no counter was read.
    """
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
        f"estimated for the class '{constants.name}', whole machine: P x t + bytes + MACs ({constants.source}), "
        f"interval x/÷ {constants.factor}. No counter was read ({reason or 'none asked'})"
    )
    stated = {**(conditions or {}), "device_class": constants.name, "seconds": seconds, **terms}

    def record(metric: str, value: float) -> Measurement:
        interval = (value / constants.factor, value * constants.factor)
        return Measurement.of(
            metric, value, source="estimated", method=method, scope="wall", ci95=interval, conditions=stated
        )

    return {
        "energy_j_per_output_token": record("energy_j_per_output_token", total / tokens.output_tokens),
        "energy_j_per_total_token": record(
            "energy_j_per_total_token", total / (tokens.output_tokens + tokens.prompt_tokens)
        ),
        "power_w": record("power_w", total / seconds),
        "idle_power_w": Measurement.unavailable("idle_power_w", reason or "no counter"),
    }
