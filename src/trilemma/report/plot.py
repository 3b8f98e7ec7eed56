"""Stand-alone line charts as SVG text, for guides and a README: own style, white ground, words beside the lines.

Pages of a report take their colours from the page; these pictures carry theirs. Only what the sweeps
need is here: lines with intervals, log or linear axes, reference marks, several panels in a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from trilemma.core.errors import OutputError
from trilemma.core.files import write_whole
from trilemma.report.scale import Axis, Scale
from trilemma.report.svg import Box, Drawing, place_labels, text_width

# Okabe and Ito's colours, darkened where white ground asks for it: told apart by colour-blind eyes too.
COLOURS = ("#0063a8", "#c75000", "#00805c", "#a3427d", "#4d5863", "#8a6d00")
STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Liberation Sans',sans-serif;fill:#1d2126}"
    ".ground{fill:#fff}.title{font-size:16px;font-weight:650}.panel{font-size:14px;font-weight:600}"
    ".axis{font-size:13px;fill:#5c6570}.tick{font-size:12px;fill:#5c6570}.note{font-size:12px;fill:#5c6570}"
    ".grid{stroke:#e6e4df;stroke-width:1}.reference{stroke:#5c6570;stroke-width:1.5;stroke-dasharray:5 4}"
    ".mark{font-size:12px;fill:#5c6570;paint-order:stroke;stroke:#fff;stroke-width:4px}"
    ".name{font-size:13px;font-weight:600;paint-order:stroke;stroke:#fff;stroke-width:4px}"
    ".line{fill:none;stroke-width:2.2;stroke-linejoin:round}.line.dashed{stroke-dasharray:6 4}"
    ".whisker{stroke-width:1.6}.dot{stroke:#fff;stroke-width:1.5}"
    + "".join(
        f".s{i}.name{{fill:{c}}}.s{i}.line,.s{i}.whisker{{stroke:{c}}}.s{i}.dot{{fill:{c}}}"
        for i, c in enumerate(COLOURS)
    )
)
NAME_SIZE, TICK_SIZE = 13.0, 12.0


@dataclass(frozen=True)
class Point:
    """One measured point with its 95% intervals, where known, and words of its own ('batch 4')."""

    x: float
    y: float
    ci95: tuple[float, float] | None = None
    x_ci95: tuple[float, float] | None = None
    words: str = ""


@dataclass(frozen=True)
class Series:
    """A named line; its name is written beside it in its colour."""

    name: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A dashed reference line: at a value of x (upright) or of y (level), with a word."""

    words: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class Chart:
    """One panel. Notes stand under it, one line each."""

    series: Sequence[Series]
    x: Axis
    y: Axis
    title: str = ""
    marks: Sequence[Mark] = ()
    notes: Sequence[str] = ()


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    title: str,
    x_unit: str = "",
    y_unit: str = "",
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] = (),
    marks: Sequence[Mark] = (),
    notes: Sequence[str] = (),
) -> str:
    """Lines over one pair of axes as a stand-alone SVG document.

    Args:
        series: at least one point in all; intervals become whiskers.
        x_unit, y_unit: 'bytes', 's', 'J', 'W' or 'ratio' are scaled and written at the ticks.
        log_x, log_y: logarithmic axes; points that are not positive are left out there.
        marks: dashed reference lines. notes: lines of small text under the picture.
    """
    chart = Chart(series, Axis(x_label, x_unit, log_x, x_ticks), Axis(y_label, y_unit, log_y), "", marks, notes)
    return chart_row([chart], title=title)


def chart_row(charts: Sequence[Chart], *, title: str, width: float = 560, height: float = 340) -> str:
    """Charts side by side under one title as a stand-alone SVG document; `width` and `height` are of one panel."""
    notes = list(dict.fromkeys(note for chart in charts for note in chart.notes))
    top = 44.0 if title else 10.0
    total = width * len(charts)
    drawing = Drawing(total, top + height + 18 * len(notes) + (8 if notes else 0), title)
    drawing.rect(0, 0, drawing.width, drawing.height, "ground")
    drawing.text(20, 28, title, "title")
    for index, chart in enumerate(charts):
        _Panel(drawing, chart, (index * width, top, (index + 1) * width, top + height)).draw()
    for index, note in enumerate(notes):
        drawing.text(20, top + height + 14 + 18 * index, note, "note")
    return standalone(drawing)


def standalone(drawing: Drawing, style: str = STYLE) -> str:
    """A drawing as an SVG document that brings its style along."""
    name, size = escape(drawing.title), f'width="{drawing.width:g}" height="{drawing.height:g}"'
    box = f'viewBox="0 0 {drawing.width:g} {drawing.height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} role="img" aria-label="{name}">'
    return f"{head}<title>{name}</title><style>{style}</style>\n" + "\n".join(drawing.parts) + "\n</svg>\n"


def check_plot_path(path: str | Path | None) -> None:
    """Refuse a path that `write_plot` would refuse, before the long work begins.

    Raises:
        OutputError: no .svg name, no such folder, or a file there that is no SVG.
    """
    if path is None:
        return
    target = Path(path)
    if target.suffix.lower() != ".svg":
        raise OutputError(f"'{target}' is no name for a plot: plots are SVG. Give a name that ends in .svg.")
    if not target.parent.is_dir():
        raise OutputError(f"The folder '{target.parent}' does not exist. Make it first, or give another path.")
    if target.exists() and not (target.is_file() and b"<svg" in target.read_bytes()[:1000]):
        raise OutputError(f"'{target}' exists and is no SVG picture. Give another path.")


def write_plot(path: str | Path, svg: str) -> Path:
    """Write a picture, whole or not at all.

    Raises:
        OutputError: as `check_plot_path`.
    """
    check_plot_path(path)
    return write_whole(path, svg)


class _Panel:
    """Draws one chart into its part of a drawing."""

    def __init__(self, drawing: Drawing, chart: Chart, area: Box) -> None:
        self.drawing, self.chart = drawing, chart
        shown = [[point for point in line.points if self._drawable(point)] for line in chart.series]
        self.points = shown
        everything = [point for points in shown for point in points]
        if not everything:
            raise ValueError("a chart needs at least one point")
        last = max(point.x for point in everything)
        self.ends = [bool(points) and points[-1].x == last and len(points) > 1 for points in shown]
        names = [line.name for line, ends in zip(chart.series, self.ends, strict=True) if ends]
        margin = max([text_width(name, NAME_SIZE) * 1.08 for name in names], default=0) + 22
        left, top, right, bottom = area
        self.frame: Box = (left + 78, top + (24 if chart.title else 6), right - margin, bottom - 52)
        xs = [v for p in everything for v in (p.x, *(p.x_ci95 or ()))] + [m.x for m in chart.marks if m.x is not None]
        ys = [v for p in everything for v in (p.y, *(p.ci95 or ()))] + [m.y for m in chart.marks if m.y is not None]
        self.x = Scale(chart.x, [v for v in xs if not chart.x.log or v > 0], self.frame[0], self.frame[2])
        self.y = Scale(chart.y, [v for v in ys if not chart.y.log or v > 0], self.frame[3], self.frame[1])

    def draw(self) -> None:
        self._axes()
        taken = self._marks()
        for index, points in enumerate(self.points):
            self._line(index, points)
        self._names(taken)

    def _drawable(self, point: Point) -> bool:
        finite = math.isfinite(point.x) and math.isfinite(point.y)
        return finite and (point.x > 0 or not self.chart.x.log) and (point.y > 0 or not self.chart.y.log)

    def _axes(self) -> None:
        left, top, right, bottom = self.frame
        draw, chart = self.drawing, self.chart
        if chart.title:
            draw.text(left, top - 8, chart.title, "panel")
        clear = -math.inf
        for tick in self.x.ticks():
            at, words = self.x(tick), self.x.words(tick)
            draw.line(at, top, at, bottom, "grid")
            half = text_width(words, TICK_SIZE) / 2
            if at - half > clear + 6:  # words that would touch the last ones are left out
                draw.text(at, bottom + 18, words, "tick", anchor="middle")
                clear = at + half
        clear = math.inf
        for tick in self.y.ticks():
            at = self.y(tick)
            draw.line(left, at, right, at, "grid")
            if at < clear - 14:
                draw.text(left - 8, at + 4, self.y.words(tick), "tick", anchor="end")
                clear = at
        draw.text((left + right) / 2, bottom + 42, chart.x.label, "axis", anchor="middle")
        draw.text(left - 62, (top + bottom) / 2, chart.y.label, "axis", anchor="middle", turn=True)

    def _marks(self) -> list[Box]:
        """Reference lines with their words; where the words stand."""
        left, top, right, bottom = self.frame
        taken: list[Box] = []
        level = 0
        for mark in self.chart.marks:
            wide = text_width(mark.words, TICK_SIZE)
            if mark.x is not None:
                at = self.x(mark.x)
                self.drawing.line(at, top, at, bottom, "reference")
                before = at + 6 + wide > right
                x, y = (at - 6 if before else at + 6), top + 14 + 17 * level
                self.drawing.text(x, y, mark.words, "mark", anchor="end" if before else "start")
                taken.append((x - wide if before else x, y - 12, x if before else x + wide, y + 4))
                level += 1
            if mark.y is not None:
                at = self.y(mark.y)
                self.drawing.line(left, at, right, at, "reference")
                self.drawing.text(left + 8, at - 6, mark.words, "mark")
                taken.append((left + 8, at - 18, left + 8 + wide, at - 2))
        return taken

    def _line(self, index: int, points: Sequence[Point]) -> None:
        css, draw = f"s{index % len(COLOURS)}", self.drawing
        dashed = " dashed" if self.chart.series[index].dashed else ""
        draw.polyline([(self.x(p.x), self.y(p.y)) for p in points], f"{css} line{dashed}")
        for p in points:
            x, y = self.x(p.x), self.y(p.y)
            tip = f"{self.chart.series[index].name}: {self.x.words(p.x)}, {self.y.words(p.y)}"
            if p.ci95 is not None and (p.ci95[0] > 0 or not self.chart.y.log):
                low, high = self.y(p.ci95[0]), self.y(p.ci95[1])
                draw.line(x, low, x, high, f"{css} whisker")
                for edge in (low, high):
                    draw.line(x - 4, edge, x + 4, edge, f"{css} whisker")
            if p.x_ci95 is not None and (p.x_ci95[0] > 0 or not self.chart.x.log):
                draw.line(self.x(p.x_ci95[0]), y, self.x(p.x_ci95[1]), y, f"{css} whisker")
            draw.circle(x, y, 4, f"{css} dot", tip=tip)

    def _names(self, taken: Sequence[Box]) -> None:
        """Names in the right margin where a line ends there, else beside its last point; words of points."""
        margin = [(self.y(points[-1].y), i) for i, points in enumerate(self.points) if self.ends[i]]
        for at, index in zip(_spread([y for y, _ in sorted(margin)], 16), [i for _, i in sorted(margin)], strict=True):
            css = f"s{index % len(COLOURS)} name"
            self.drawing.text(self.frame[2] + 10, at + 4.5, self.chart.series[index].name, css)
        free = [(points[-1], i) for i, points in enumerate(self.points) if points and not self.ends[i]]
        texts = [(p, self.chart.series[i].name, f"s{i % len(COLOURS)} name") for p, i in free]
        texts += [(p, p.words, "mark") for points in self.points for p in points if p.words]
        wanted = [(self.x(p.x), self.y(p.y), words) for p, words, _ in texts]
        spots = place_labels(wanted, NAME_SIZE, self.frame, [*taken, *self._obstacles()])
        for (x, y, words), (_, _, css), spot in zip(wanted, texts, spots, strict=True):
            at_x, at_y, anchor = spot or (x, y - 12, "middle")
            self.drawing.text(at_x, at_y, words, css, anchor=anchor)

    def _obstacles(self) -> list[Box]:
        """Small boxes along every line and whisker, so that words keep off them; those near a point are left out."""
        found: list[Box] = []
        for points in self.points:
            places = [(self.x(p.x), self.y(p.y)) for p in points]
            for (x1, y1), (x2, y2) in pairwise(places):
                steps = int(math.hypot(x2 - x1, y2 - y1) / 6)
                for step in range(2, steps - 1):
                    x, y = x1 + (x2 - x1) * step / steps, y1 + (y2 - y1) * step / steps
                    found.append((x - 2, y - 2, x + 2, y + 2))
            for p, (x, y) in zip(points, places, strict=True):
                if p.ci95 is not None and (p.ci95[0] > 0 or not self.chart.y.log):
                    found.append((x - 4, self.y(p.ci95[1]), x + 4, self.y(p.ci95[0])))
                if p.x_ci95 is not None and (p.x_ci95[0] > 0 or not self.chart.x.log):
                    found.append((self.x(p.x_ci95[0]), y - 2, self.x(p.x_ci95[1]), y + 2))
        return found


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Rising positions moved as little as a sweep allows until they lie `gap` apart, centred on where they were."""
    blocks: list[list[float]] = []  # wanted positions that touch, laid out around their mean
    for place in places:
        blocks.append([place])
        while len(blocks) > 1 and _end(blocks[-2], gap) + gap > _start(blocks[-1], gap):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [_start(block, gap) + gap * i for block in blocks for i in range(len(block))]


def _start(block: Sequence[float], gap: float) -> float:
    return sum(block) / len(block) - gap * (len(block) - 1) / 2


def _end(block: Sequence[float], gap: float) -> float:
    return _start(block, gap) + gap * (len(block) - 1)


__all__ = [
    "Axis", "Chart", "Mark", "Point", "Series",
    "chart_row", "check_plot_path", "line_chart", "standalone", "write_plot",
]  # fmt: skip
