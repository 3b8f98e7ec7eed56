"""Values with their intervals by group, as dots beside each other: quality by domain and model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from trilemma.report.plot import COLOURS, NAME_SIZE, standalone
from trilemma.report.scale import Axis, Scale
from trilemma.report.svg import Drawing, text_width


@dataclass(frozen=True)
class Dot:
    """One value and its 95% interval; None where nothing is known. `words` say the value."""

    value: float | None
    ci95: tuple[float, float] | None = None
    words: str = ""


def dot_chart(
    groups: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Dot]]],
    axis: Axis,
    *,
    title: str,
    notes: Sequence[str] = (),
    width: float = 860,
) -> str:
    """A line a group and row, level intervals with a dot, as a stand-alone SVG document.

    Args:
        groups: names down the left side.
        rows: (name, a dot for each group); each has a colour.
        axis: of the values; 0 is marked where it lies inside.
    """
    values = [v for _, dots in rows for dot in dots if dot.value is not None for v in (dot.value, *(dot.ci95 or ()))]
    if not values:
        raise ValueError("a chart needs at least one value")
    name_width = max(text_width(name, NAME_SIZE) for name in groups) * 1.25
    legend_width = max(text_width(name, NAME_SIZE) for name, _ in rows) * 1.12
    left, right, top, step = 28 + name_width, width - legend_width - 40, 52.0, 24.0
    block = step * len(rows) + 18
    bottom = top + block * len(groups)
    under = [line for note in notes for line in wrap(note, int(width / 6.8))]
    drawing = Drawing(width, bottom + 62 + 18 * len(under), title)
    drawing.rect(0, 0, drawing.width, drawing.height, "ground")
    drawing.text(20, 28, title, "title")
    x = Scale(axis, [*values, 0.0] if not axis.log else values, left, right)
    for tick in x.ticks():
        drawing.line(x(tick), top, x(tick), bottom, "grid")
        drawing.text(x(tick), bottom + 18, x.words(tick), "tick", anchor="middle")
    if not axis.log:
        drawing.line(x(0.0), top, x(0.0), bottom, "reference")
    drawing.text((left + right) / 2, bottom + 42, axis.label, "axis", anchor="middle")
    for number, group in enumerate(groups):
        start = top + block * number
        drawing.text(left - 12, start + block / 2 + 4, group, "panel", anchor="end")
        if number:
            drawing.line(20, start, right, start, "grid")
        for index, (name, dots) in enumerate(rows):
            _draw_dot(drawing, x, dots[number], start + 21 + step * index, f"s{index % len(COLOURS)}", name)
    for index, (name, _) in enumerate(rows):
        drawing.circle(right + 22, top + 21 + 22 * index, 4, f"s{index % len(COLOURS)} dot")
        drawing.text(right + 32, top + 25.5 + 22 * index, name, f"s{index % len(COLOURS)} name")
    for index, line in enumerate(under):
        drawing.text(20, bottom + 66 + 18 * index, line, "note")
    return standalone(drawing)


def _draw_dot(drawing: Drawing, x: Scale, dot: Dot, y: float, css: str, name: str) -> None:
    if dot.value is None:
        return
    end = dot.value
    if dot.ci95 is not None:
        low, high = dot.ci95
        drawing.line(x(low), y, x(high), y, f"{css} whisker")
        for edge in (low, high):
            drawing.line(x(edge), y - 4, x(edge), y + 4, f"{css} whisker")
        end = high
    drawing.circle(x(dot.value), y, 4.5, f"{css} dot", tip=f"{name}: {dot.words}")
    drawing.text(x(end) + 8, y + 4, dot.words, "tick")


__all__ = ["Dot", "dot_chart"]
