"""A waterfall as a stand-alone picture: one panel a metric, one bar a step, what it took away or added."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from trilemma.core.metric import METRICS
from trilemma.core.quantity import format_percent, format_quantity, significant
from trilemma.core.waterfall import Waterfall
from trilemma.report.numbers import label
from trilemma.report.plot import STYLE, standalone
from trilemma.report.svg import Drawing, linear_ticks, text_width

PANELS = ("weights_bytes", "tpot_s", "kl_mean")
_STYLE = (
    ".whole{fill:#5c6570}.less{fill:#00805c}.more{fill:#c75000}"
    ".join{stroke:#5c6570;stroke-width:1;stroke-dasharray:3 3}"
    ".value{font-size:12px;font-weight:600;fill:#1d2126}"
)
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 400.0, 380.0, 70.0, 74.0, 300.0


def waterfall_plot(found: Waterfall) -> str:
    """Weights, time per token and KL divergence after each step as a stand-alone SVG document."""
    shown = [metric for metric in PANELS if all(value is not None for value in found.values(metric))]
    drawing = Drawing(_WIDTH * len(shown), _HEIGHT + 20, f"{found.model}: what each step of {found.recipe} changes")
    drawing.rect(0, 0, drawing.width, drawing.height, "ground")
    drawing.text(20, 28, drawing.title, "title")
    names = ["before", *(step.name for step in found.steps[1:]), "after"]
    for index, metric in enumerate(shown):
        values = [value for value in found.values(metric) if value is not None]
        _panel(drawing, index * _WIDTH, metric, names, values)
    twin = "; random weights: cost only" if found.twin else ""
    note = f"{found.environment.cpu}, {found.environment.threads} threads; steps in the recipe's order{twin}"
    drawing.text(20, _HEIGHT + 8, note, "note")
    return standalone(drawing, STYLE + _STYLE)


def bars(values: Sequence[float]) -> list[tuple[float, float, str]]:
    """(from, to, kind) of every bar: the first value, one bar a change, the last value."""
    found = [(0.0, values[0], "whole")]
    for before, after in pairwise(values):
        found.append((before, after, "less" if after <= before else "more"))
    return [*found, (0.0, values[-1], "whole")]


def _panel(drawing: Drawing, x0: float, metric: str, names: Sequence[str], values: Sequence[float]) -> None:
    unit = METRICS[metric].unit
    top = max(values) * 1.08 or 1.0
    left, right = x0 + _LEFT, x0 + _WIDTH - 14

    def y(value: float) -> float:
        return _BOTTOM - value / top * (_BOTTOM - _TOP)

    in_words = unit if unit == "nats" else ""  # units without steps stand in the title, not at every number
    drawing.text(left, _TOP - 18, f"{label(metric)}, {in_words}" if in_words else label(metric), "panel")
    for tick in linear_ticks(0.0, top):
        drawing.line(left, y(tick), right, y(tick), "grid")
        drawing.text(left - 8, y(tick) + 4, _number(tick, unit), "tick", anchor="end")
    drawn = bars(values)
    slot = (right - left) / len(drawn)
    for index, ((start, end, kind), name) in enumerate(zip(drawn, names, strict=True)):
        x, wide = left + index * slot + slot * 0.15, slot * 0.7
        high, low = max(start, end), min(start, end)
        words = _number(end, unit) if kind == "whole" else _change(start, end, unit)
        drawing.rect(x, y(high), wide, max(y(low) - y(high), 1.0), kind, tip=f"{name}: {format_quantity(end, unit)}")
        if index + 1 < len(drawn):
            drawing.line(x + wide, y(end), x + slot, y(end), "join")
        drawing.text(x + wide / 2, y(high) - 5, words, "value", anchor="middle")
        _bar_name(drawing, x + wide / 2, name, slot)


def _number(value: float, unit: str) -> str:
    return significant(value) if unit == "nats" else format_quantity(value, unit)


def _change(start: float, end: float, unit: str) -> str:
    """As per cent, or as it is where it grows out of next to nothing."""
    if unit == "nats" or start <= 0 or end > 10 * start:
        return f"{'+' if end >= start else '-'}{_number(abs(end - start), unit)}"
    return format_percent(end / start - 1, signed=True)


def _bar_name(drawing: Drawing, x: float, name: str, slot: float) -> None:
    """The name under its bar, a word a line where it is too wide."""
    lines = [name] if text_width(name, 12) <= slot else name.split(" ")
    for index, line in enumerate(lines):
        drawing.text(x, _BOTTOM + 17 + 15 * index, line, "tick", anchor="middle")
