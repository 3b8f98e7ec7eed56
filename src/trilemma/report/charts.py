"""The pictures of a report: a bar per limit, the front as a scatter, bytes by role as stacked bars."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from trilemma.core.metric import METRICS
from trilemma.core.quantity import format_percent, format_quantity
from trilemma.core.results import ByteRow
from trilemma.core.trial import Trial
from trilemma.core.verdict import Verdict
from trilemma.report.numbers import label
from trilemma.report.svg import Drawing, linear_ticks, log_ticks, place_labels, text_width

KL_FLOOR = 1e-7
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def limit_bar(found: Verdict) -> Markup:
    """One limit: the allowed side shaded, the threshold as a line, the value with its 95% interval."""
    value, interval, threshold, unit = _on_one_axis(found)
    if value is None or threshold is None:
        return Markup("")
    low, high = interval or (value, value)
    start = min(0.0, low * 1.1)
    end = max(threshold, high, 1.0 if found.limit.relative else 0.0) * 1.12 or 1.0
    drawing = Drawing(560, 66, f"{found.limit.text}: {format_quantity(value, unit)}, {found.outcome}")
    left, width, top = 8.0, 544.0, 22.0

    def x(v: float) -> float:
        return left + width * (v - start) / (end - start)

    drawing.rect(left, top, width, 18, "track", radius=4)
    inside = (left, x(threshold)) if found.limit.op == "<=" else (x(threshold), left + width)
    drawing.rect(inside[0], top, inside[1] - inside[0], 18, "allowed", radius=4)
    if found.limit.relative:
        drawing.line(x(1.0), top, x(1.0), top + 18, "unmodified")
    tip = f"{format_quantity(value, unit)}, 95% {format_quantity(low, unit)} to {format_quantity(high, unit)}"
    drawing.rect(x(low), top + 5, max(x(high) - x(low), 2), 8, f"interval {found.outcome.lower()}", tip=tip, radius=2)
    drawing.circle(x(value), top + 9, 6, f"point {found.outcome.lower()}", tip=tip)
    drawing.line(x(threshold), top - 5, x(threshold), top + 23, "threshold")
    words = f"{'≤' if found.limit.op == '<=' else '≥'} {format_quantity(threshold, unit)}"
    _bounded_text(drawing, x(threshold), top - 9, words, "tick strong")
    _bounded_text(drawing, x(value), top + 35, format_quantity(value, unit), "tick")
    if found.limit.relative and abs(x(1.0) - x(value)) > 90:
        _bounded_text(drawing, x(1.0), top + 35, "unmodified", "tick")
    return drawing.render()


def _on_one_axis(found: Verdict) -> tuple[float | None, tuple[float, float] | None, float | None, str]:
    if found.limit.relative:
        return found.relative_value, found.relative_ci95, found.limit.value, "ratio"
    return found.measurement.value, found.measurement.interval, found.limit.value, found.measurement.unit


def _bounded_text(drawing: Drawing, x: float, y: float, words: str, css: str) -> None:
    half = text_width(words, 12) / 2
    drawing.text(min(max(x, half + 2), drawing.width - half - 2), y, words, css, anchor="middle")


def front_scatter(
    trials: Sequence[Trial], front: Sequence[str], chosen: str | None, baseline: str, x_metric: str
) -> Markup:
    """KL divergence (log) against a cost; the front joined, the chosen and the unmodified model marked."""
    usable = [t for t in trials if t.value(x_metric) is not None and t.value("kl_mean") is not None]
    if not usable:
        return Markup("")
    unit = METRICS[x_metric].unit
    drawing = Drawing(560, 380, f"{label(x_metric)} against KL divergence of {len(usable)} candidates")
    left, top, right, bottom = 62.0, 14.0, 546.0, 330.0
    xs = [_known(t, x_metric) for t in usable]
    ys = [max(_known(t, "kl_mean"), KL_FLOOR) for t in usable]
    x_low, x_high = _padded(min(xs), max(xs))
    y_low, y_high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)) + 1e-9)
    if y_low == y_high:
        y_high *= 10

    def place(trial: Trial) -> tuple[float, float]:
        share_x = (_known(trial, x_metric) - x_low) / (x_high - x_low)
        share_y = math.log(max(_known(trial, "kl_mean"), KL_FLOOR) / y_low) / math.log(y_high / y_low)
        return left + share_x * (right - left), bottom - share_y * (bottom - top)

    for tick in linear_ticks(x_low, x_high):
        x = left + (tick - x_low) / (x_high - x_low) * (right - left)
        drawing.line(x, top, x, bottom, "grid")
        drawing.text(x, bottom + 17, format_quantity(tick, unit), "tick", anchor="middle")
    for tick in log_ticks(y_low, y_high):
        y = bottom - math.log(tick / y_low) / math.log(y_high / y_low) * (bottom - top)
        drawing.line(left, y, right, y, "grid")
        drawing.text(left - 7, y + 4, _power(tick), "tick", anchor="end")
    drawing.text((left + right) / 2, bottom + 40, f"{label(x_metric)} (less is better)", "axis", anchor="middle")
    drawing.text(14, (top + bottom) / 2, "KL divergence, nats (less is better)", "axis", anchor="middle", turn=True)

    by_x = sorted((t for t in usable if t.name in front), key=lambda t: _known(t, x_metric))
    drawing.polyline([place(t) for t in _staircase(by_x)], "front-line")
    ranked = sorted(usable, key=lambda t: (t.name != chosen, t.name != baseline, t.name not in front))
    for trial in reversed(ranked):
        css = (
            "dot chosen" if trial.name == chosen else "dot base" if trial.name == baseline
            else "dot front" if trial.name in front else "dot"
        )  # fmt: skip
        x, y = place(trial)
        tip = f"{trial.name}: {format_quantity(trial.value(x_metric), unit)}, KL {_known(trial, 'kl_mean'):.2g} nats"
        drawing.circle(x, y, 8 if trial.name == chosen else 5.5, css, tip=tip)
    labels = [(*place(t), t.name) for t in ranked]
    spots = place_labels(labels, 12, (left, top, right, bottom))
    for trial, spot in zip(ranked, spots, strict=True):
        if spot is not None:
            drawing.text(spot[0], spot[1], trial.name, _label_css(trial.name, chosen, baseline), anchor=spot[2])
    return drawing.render()


def _power(tick: float) -> str:
    """'0.01', '10⁻⁵'."""
    exponent = round(math.log10(tick))
    return f"{tick:g}" if exponent >= -3 else f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _label_css(name: str, chosen: str | None, baseline: str) -> str:
    return "mark strong" if name == chosen else "mark" if name == baseline else "mark faint"


def _staircase(by_x: Sequence[Trial]) -> list[Trial]:
    """The members of the front that are also undominated in these two axes, left to right."""
    kept: list[Trial] = []
    best = math.inf
    for trial in by_x:
        if _known(trial, "kl_mean") < best:
            kept.append(trial)
            best = _known(trial, "kl_mean")
    return kept


def stacked_bytes(rows: Sequence[ByteRow]) -> Markup:
    """Bytes by role of the original and the chosen model, on one scale."""
    totals = [sum(row.original_bytes for row in rows), sum(row.chosen_bytes for row in rows)]
    if not rows or max(totals) == 0:
        return Markup("")
    drawing = Drawing(
        1080, 118, f"Weight bytes: {format_quantity(totals[0], 'bytes')} to {format_quantity(totals[1], 'bytes')}"
    )
    scale = 800 / max(totals)
    for line, (name, total) in enumerate(zip(("unmodified", "chosen"), totals, strict=True)):
        x, y = 110.0, 8.0 + 44 * line
        drawing.text(x - 12, y + 22, name, "axis", anchor="end")
        for index, row in enumerate(rows):
            size, form = (row.chosen_bytes, row.chosen_format) if line else (row.original_bytes, row.original_format)
            tip = f"{row.role}: {format_quantity(size, 'bytes')} as {form}"
            drawing.rect(x, y, size * scale - 1, 32, f"role role{index % 6}", tip=tip)
            words = f"{row.role} {format_quantity(size, 'bytes')}"
            if text_width(words, 12) + 12 < size * scale:
                drawing.text(x + 8, y + 21, words, "inbar")
            x += size * scale
        share = f" ({format_percent(total / totals[0])})" if line and totals[0] else ""
        drawing.text(x + 10, y + 21, f"{format_quantity(total, 'bytes')}{share}", "axis strong")
    x = 110.0
    for index, row in enumerate(rows):
        drawing.rect(x, 100, 10, 10, f"role role{index % 6}", radius=2)
        drawing.text(x + 15, 109, row.role, "tick")
        x += 15 + text_width(row.role, 12) + 24
    return drawing.render()


def _known(trial: Trial, metric: str) -> float:
    value = trial.value(metric)
    return math.nan if value is None else value


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return max(0.0, low - pad), high + pad
