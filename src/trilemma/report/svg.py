"""A few drawing primitives as inline SVG text. Colours come from the page's style sheet by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from markupsafe import Markup

CHARACTER_WIDTH = 0.56  # of the font size: an average for sans-serif text, good enough to keep labels apart


@dataclass
class Drawing:
    """A picture in user units; `title` is what a screen reader says."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def rect(
        self, x: float, y: float, width: float, height: float, css: str, *, tip: str = "", radius: float = 0
    ) -> None:
        self._add("rect", {"x": x, "y": y, "width": max(width, 0), "height": height, "rx": radius, "class": css}, tip)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self._add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": css})

    def circle(self, x: float, y: float, radius: float, css: str, *, tip: str = "") -> None:
        self._add("circle", {"cx": x, "cy": y, "r": radius, "class": css}, tip)

    def polyline(self, points: Sequence[tuple[float, float]], css: str) -> None:
        self._add("polyline", {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points), "class": css})

    def text(self, x: float, y: float, words: str, css: str, *, anchor: str = "start", turn: bool = False) -> None:
        rotate = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{escape(css)}" text-anchor="{anchor}"{rotate}>{escape(words)}</text>'
        )

    def render(self) -> Markup:
        name = escape(self.title)
        head = f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{name}">'
        return Markup(f"{head}<title>{name}</title>{''.join(self.parts)}</svg>")

    def _add(self, tag: str, attributes: dict[str, float | str], tip: str = "") -> None:
        shown = " ".join(
            f'{key}="{value:.1f}"' if isinstance(value, float | int) else f'{key}="{escape(value)}"'
            for key, value in attributes.items()
        )
        inside = f"<title>{escape(tip)}</title>" if tip else ""
        self.parts.append(f"<{tag} {shown}>{inside}</{tag}>")


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], at most seven."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / 7))
    return [10.0**exponent for exponent in range(first, last + 1, every)]


def text_width(words: str, size: float) -> float:
    return len(words) * size * CHARACTER_WIDTH


Box = tuple[float, float, float, float]  # x0, y0, x1, y1


def place_labels(
    points: Sequence[tuple[float, float, str]], size: float, frame: Box, taken: Sequence[Box] = ()
) -> list[tuple[float, float, str] | None]:
    """Where each point's label goes, (x, y, anchor), so that none covers another or a marker; None: no room.

    Points come most important first: earlier labels get the better places.
    """
    markers = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    used: list[Box] = [*taken]
    placed: list[tuple[float, float, str] | None] = []
    for index, (x, y, words) in enumerate(points):
        others = markers[:index] + markers[index + 1 :]
        spot = None
        for label_x, label_y, anchor in _spots(x, y, size):
            box = _box(label_x, label_y, anchor, words, size)
            if _within(box, frame) and not any(_overlap(box, other) for other in (*used, *others)):
                spot = (label_x, label_y, anchor)
                used.append(box)
                break
        placed.append(spot)
    return placed


def _spots(x: float, y: float, size: float) -> list[tuple[float, float, str]]:
    middle = y + size * 0.35
    spots = [(x + 10, middle, "start"), (x - 10, middle, "end"), (x, y - 11, "middle"), (x, y + 10 + size, "middle")]
    for away in (1.2, 2.2, 3.2):
        spots += [(x + 9, middle - size * away, "start"), (x + 9, middle + size * away, "start")]
        spots += [(x - 9, middle - size * away, "end"), (x - 9, middle + size * away, "end")]
    return spots


def _box(x: float, y: float, anchor: str, words: str, size: float) -> Box:
    width = text_width(words, size)
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return (left, y - size * 0.85, left + width, y + size * 0.25)


def _within(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
