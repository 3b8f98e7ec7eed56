"""Measurements as text: value, interval, and a word where the number is not a measurement."""

from __future__ import annotations

import statistics

from trilemma.core.measurement import Measurement
from trilemma.core.metric import METRICS
from trilemma.core.quantity import format_duration, format_percent, format_quantity, significant
from trilemma.core.verdict import Verdict

LABELS = {
    "weights_bytes": "Weights", "artifact_bytes": "On disk", "engine_memory_bytes": "Engine memory",
    "peak_memory_bytes": "Peak memory", "kv_bytes_per_token": "KV per token", "ttft_s": "First token",
    "tpot_s": "Time per token", "itl_s": "Gap between tokens",
    "itl_p99_s": "99% of gaps", "prefill_tokens_per_s": "Prefill",
    "decode_tokens_per_s": "Decode", "throughput_tokens_per_s": "Throughput",
    "energy_j_per_output_token": "Energy per token", "perplexity": "Perplexity", "bits_per_byte": "Bits per byte",
    "ppl_increase": "Perplexity increase", "kl_mean": "KL divergence", "kl_p99": "KL, 99th percentile",
    "kl_p999": "KL, 99.9th percentile", "top1_agreement": "Top-1 agreement", "build_s": "Build time",
    "build_energy_j": "Build energy", "battery_h": "Battery",
}  # fmt: skip


def label(metric: str) -> str:
    """What a metric is called for people; its own name where it has no other."""
    return LABELS.get(metric, metric)


def show_value(measurement: Measurement | None) -> str:
    """'13.6 MB', '+1.2%', '—' when absent or unavailable."""
    if measurement is None or measurement.value is None:
        return "—"
    return _one(measurement.metric, measurement.value, measurement.unit)


def show_interval(measurement: Measurement | None) -> str:
    """'1.1% to 1.4%', or '' when the value is exact or no interval is known."""
    if measurement is None or measurement.value is None or measurement.ci95 is None:
        return ""
    low, high = measurement.ci95
    if low == high:
        return ""
    shown = [_one(measurement.metric, edge, measurement.unit) for edge in (low, high)]
    unit = shown[1].partition(" ")[2]
    return f"{shown[0].removesuffix(f' {unit}') if unit else shown[0]} to {shown[1]}"


def ratio(after: Measurement, before: Measurement) -> float:
    """One value as a fraction of another: from paired repetitions where both have them, as verdicts do it."""
    ours, theirs = after.samples, before.samples
    if len(ours) == len(theirs) >= 3 and min(*ours, *theirs) > 0:
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    assert after.value is not None
    assert before.value
    return after.value / before.value


def show_source(measurement: Measurement | None) -> str:
    """'' for a measurement; 'estimated', 'unavailable' or 'noisy' as a warning beside the number."""
    if measurement is None:
        return ""
    if measurement.source != "measured":
        return measurement.source
    return "noisy" if measurement.noisy else ""


def show_threshold(verdict: Verdict) -> str:
    """'≤ 6.82 MB (50% of the unmodified)', '≤ 2.0%'."""
    sign = "≤" if verdict.limit.op == "<=" else "≥"
    unit = METRICS[verdict.limit.metric].unit if verdict.limit.metric in METRICS else "ratio"
    if not verdict.limit.relative:
        return f"{sign} {format_quantity(verdict.limit.value, unit)}"
    share = f"{format_percent(verdict.limit.value)} of the unmodified"
    if verdict.threshold is None:
        return f"{sign} {share}"
    return f"{sign} {format_quantity(verdict.threshold, unit)} ({share})"


def _one(metric: str, value: float, unit: str) -> str:
    if metric == "ppl_increase":
        return format_percent(value, signed=True)
    return format_quantity(value, unit)


__all__ = [
    "format_duration",
    "format_percent",
    "format_quantity",
    "label",
    "ratio",
    "show_interval",
    "show_source",
    "show_threshold",
    "show_value",
    "significant",
]
