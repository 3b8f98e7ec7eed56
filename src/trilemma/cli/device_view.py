"""`trilemma inspect --device`: what a model would cost on a device that is not here, scheme by scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from trilemma.core.device import Device
    from trilemma.core.duty import DutyCycle
    from trilemma.core.host_tables import HostTables
    from trilemma.core.measurement import Measurement
    from trilemma.measure.device.device_model import Forecast
    from trilemma.model.model import Model

COLUMNS = (
    ("first token", "ttft_s"),
    ("time per token", "tpot_s"),
    ("tokens/s", "decode_tokens_per_s"),
    ("energy per token", "energy_j_per_output_token"),
    ("battery", "battery_h"),
)


def show_device(
    name: str, model: Model, device_name: str, schemes: list[str], context: int | None, duty_cycle: str | None
) -> None:
    """The table, with what the numbers rest on."""
    device, duty, found = predict(model, device_name, schemes, context, duty_cycle)
    from trilemma.cli import console
    from trilemma.core.quantity import format_quantity

    usable = format_quantity(device.usable_bytes.value, "bytes")
    typer.echo(f"{name} on {device.title}")
    typer.echo(f"predicted for {device.runtime}")
    rows = [[scheme, *_cells(forecast)] for scheme, forecast in found.items()]
    headers = ["scheme", f"memory (of {usable})", "fits", "waits for", *(title for title, _ in COLUMNS)]
    first = next(iter(found.values())).measurements["tpot_s"].conditions
    console.table(f"{first['prompt_tokens']} prompt and {first['output_tokens']} output tokens", headers, rows)
    for line in _notes(device, duty, found):
        typer.echo(line)


def device_json(
    model: Model, device_name: str, schemes: list[str], context: int | None, duty_cycle: str | None
) -> dict[str, Any]:
    """The same as one JSON document, with the profile that it rests on."""
    device, duty, found = predict(model, device_name, schemes, context, duty_cycle)
    return {
        "device": device.model_dump(mode="json"),
        "duty_cycle": None if duty is None else duty.text,
        "forecasts": {scheme: forecast.model_dump(mode="json") for scheme, forecast in found.items()},
    }


def predict(
    model: Model, device_name: str, schemes: list[str], context: int | None, duty_cycle: str | None
) -> tuple[Device, DutyCycle | None, dict[str, Forecast]]:
    """The profile, the duty cycle, and a forecast for each scheme."""
    from trilemma.core.device import load_device
    from trilemma.core.duty import DutyCycle
    from trilemma.search.forecast import SCHEMES, forecast_schemes

    device = load_device(device_name)
    duty = None if duty_cycle is None else DutyCycle.parse(duty_cycle)
    return device, duty, forecast_schemes(model, device, schemes=schemes or SCHEMES, context=context, duty=duty)


def _cells(forecast: Forecast) -> list[str]:
    from trilemma.core.quantity import format_quantity

    needed = format_quantity(forecast.needed_bytes, "bytes")
    shown = [_show(forecast.measurements[metric]) for _, metric in COLUMNS] if forecast.fits else ["—"] * len(COLUMNS)
    return [needed, "yes" if forecast.fits else "NO", forecast.bound if forecast.fits else "—", *shown]


def _show(measurement: Measurement) -> str:
    """'~23.1 ms [18.5, 28.9]', units as everywhere; a dash when there is none."""
    from trilemma.cli import console

    return console.show(measurement).replace(" tokens/s", "")


def _notes(device: Device, duty: DutyCycle | None, found: dict[str, Forecast]) -> list[str]:
    lines = _published_notes(device, found) if device.host is None else _measured_notes(device, device.host, found)
    lines += _remedies(found)
    hours = [forecast.measurements["battery_h"] for forecast in found.values() if forecast.fits]
    reasons = dict.fromkeys(item.reason for item in hours if item.reason)
    lines += [f"Battery: {reason}." for reason in reasons]
    if device.battery_wh is not None and len(reasons) < len(hours):
        when = f"at {duty.text}" if duty is not None else "answering without a pause (--duty-cycle says how often)"
        lines.append(
            f"Battery hours {when}: {device.battery_wh.value:g} Wh, {device.idle_w.value:g} W between answers "
            f"({device.idle_w.basis}: {device.idle_w.claim})."
        )
    return lines


def _published_notes(device: Device, found: dict[str, Forecast]) -> list[str]:
    lines = [
        f"All times and energies are estimates (~) with the interval that covers the published cases found: "
        f"decode x/÷ {device.decode_factor.value:g}, prefill x/÷ {device.prefill_factor.value:g}, "
        f"energy x/÷ {device.energy_factor.value:g}."
    ]
    read = min(float(forecast.measurements["tpot_s"].conditions["read_bytes"]) for forecast in found.values())
    if device.widening(read) > 1:
        lines.append(
            f"This model is smaller than any published case (which read {device.checked_bytes.value / 1e6:,.0f} MB a "
            "token or more): where it is, the factors are doubled."
        )
    return lines


def _measured_notes(device: Device, tables: HostTables, found: dict[str, Forecast]) -> list[str]:
    """What a profile of `trilemma profile` rests on: its own check cases."""
    from trilemma.cli.profile import error_lines

    lines = [
        f"Times are sums of kernel times measured on {tables.measured} (~ estimates); their intervals are the 90th "
        f"percentile of the error on held-out models: {'; '.join(error_lines(tables))}."
    ]
    if tables.noisy:
        lines.append(f"The profile was taken on a noisy machine: {tables.noisy}.")
    methods = dict.fromkeys(forecast.measurements["tpot_s"].method for forecast in found.values())
    stands = dict.fromkeys(part.strip() for method in methods for part in method.split(";") if "stands for" in part)
    lines += [f"Not timed in the profile: {part}." for part in stands]
    lines.append(f"Energies x/÷ {device.energy_factor.value:g} ({device.energy_factor.claim}).")
    return lines


REMEDIES = {
    "memory": "bound by memory: fewer bytes help (the model's structure: fewer bits, layers or experts; the decoding: "
    "a smaller KV cache, several drafted tokens a step; the system: batching)",
    "compute": "bound by compute: fewer or cheaper products help (the model's structure: int8 inputs, narrower "
    "layers; the decoding: reusing a prompt's cache; the system: more threads)",
    "overhead": "bound by overhead, not by bytes or arithmetic: fewer and wider layers help (the model's structure), "
    "several tokens a step (the decoding), batching (the system); fewer bits do not",
}


def _remedies(found: dict[str, Forecast]) -> list[str]:
    """What decode and prefill wait for, in words, and which kind of remedy helps."""
    lines = []
    for what, key in (("Decode", "bound"), ("Prefill", "prefill_bound")):
        by_bound: dict[str, list[str]] = {}
        for scheme, forecast in found.items():
            by_bound.setdefault(getattr(forecast, key), []).append(scheme)
        for bound, schemes in by_bound.items():
            which = "" if len(by_bound) == 1 else f" ({', '.join(schemes)})"
            lines.append(f"{what}{which} is {REMEDIES[bound]}.")
    return lines
