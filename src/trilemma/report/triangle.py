"""The trilemma as a picture: a triangle for each version of a model, one corner each for memory, time and accuracy.

How far a filled shape reaches into a corner says how good the version is there, on a logarithmic scale between
the worst and the best of the versions shown. No shape fills all corners: that is the point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trilemma.core.ladder import Ladder, Rung
from trilemma.core.quantity import format_quantity, significant
from trilemma.report.plot import STYLE, standalone
from trilemma.report.svg import Drawing

_WIDTH, _HEIGHT, _RADIUS, _COLUMNS = 236.0, 250.0, 74.0, 4
_LEAST = 0.06  # of the radius: the worst is still seen as a shape
_ANGLES = {"accuracy": -90.0, "time": 30.0, "memory": 150.0}
_STYLE = STYLE + (
    ".edge{fill:none;stroke:#c9c5bd;stroke-width:1}.half{fill:none;stroke:#e6e4df;stroke-width:1}"
    ".shape{fill:#0063a8;fill-opacity:.28;stroke:#0063a8;stroke-width:2;stroke-linejoin:round}"
    ".shape.repair{fill:#00805c;stroke:#00805c}.value{font-size:12px;fill:#1d2126}"
    ".corner{font-size:11px;fill:#5c6570}.version{font-size:14px;font-weight:650}"
)


@dataclass(frozen=True)
class Version:
    """One triangle. Lower is better in all three: bytes, seconds a token, KL in nats."""

    name: str
    memory_bytes: float
    time_s: float
    kl: float
    repair: bool = False


def ladder_triangles(ladder: Ladder) -> str:
    """Every rung that was measured in all three, as a stand-alone SVG document; f32 is the first."""
    versions = [version for rung in ladder.rungs if (version := _version(rung)) is not None]
    return triangles(versions, title=f"Memory, time, accuracy: {ladder.model}")


def triangles(versions: Sequence[Version], *, title: str) -> str:
    """Triangles side by side as a stand-alone SVG document.

    Raises:
        ValueError: no version.
    """
    if not versions:
        raise ValueError("there is no version to draw")
    scores = {
        "memory": _scores([version.memory_bytes for version in versions]),
        "time": _scores([version.time_s for version in versions]),
        "accuracy": _scores([version.kl for version in versions]),
    }
    columns = min(_COLUMNS, len(versions))
    rows = math.ceil(len(versions) / columns)
    drawing = Drawing(columns * _WIDTH, 48 + rows * _HEIGHT + 26, title)
    drawing.rect(0, 0, drawing.width, drawing.height, "ground")
    drawing.text(20, 28, title, "title")
    for index, version in enumerate(versions):
        row, column = divmod(index, columns)
        centre = ((column + 0.5) * _WIDTH, 48 + row * _HEIGHT + 132)
        _draw(drawing, version, {corner: scores[corner][index] for corner in scores}, centre)
    note = "Nearer to a corner is better there; each corner's scale is logarithmic, from the worst to the best shown."
    drawing.text(20, drawing.height - 12, note, "note")
    return standalone(drawing, _STYLE)


def _version(rung: Rung) -> Version | None:
    values = [rung.measurements[name].value if name in rung.measurements else None
              for name in ("weights_bytes", "tpot_s", "kl_mean")]  # fmt: skip
    size, time_s, kl = values
    if size is None or time_s is None or kl is None:
        return None
    return Version(rung.name, size, time_s, kl, rung.repairs is not None)


def _scores(values: Sequence[float]) -> list[float]:
    """1 for the least, near 0 for the most, logarithmic between."""
    logs = [math.log(max(value, 1e-9)) for value in values]
    span = max(logs) - min(logs)
    return [1.0 if span == 0 else max(_LEAST, (max(logs) - value) / span) for value in logs]


def _draw(drawing: Drawing, version: Version, scores: dict[str, float], centre: tuple[float, float]) -> None:
    x, y = centre
    drawing.text(x, y - 112, version.name, "version", anchor="middle")
    for share, css in ((1.0, "edge"), (0.5, "half")):
        drawing.polyline(_closed([_at(centre, corner, share) for corner in _ANGLES]), css)
    shape = _closed([_at(centre, corner, scores[corner]) for corner in _ANGLES])
    drawing.polyline(shape, "shape repair" if version.repair else "shape")
    said = {
        "accuracy": f"KL {significant(version.kl, 2)}",
        "time": format_quantity(version.time_s, "s"),
        "memory": format_quantity(version.memory_bytes, "bytes"),
    }
    for corner, anchor in (("accuracy", "middle"), ("time", "middle"), ("memory", "middle")):
        corner_x, corner_y = _at(centre, corner, 1.0)
        up = corner == "accuracy"
        drawing.text(corner_x, corner_y - (18 if up else -14), corner, "corner", anchor=anchor)
        drawing.text(corner_x, corner_y - (5 if up else -28), said[corner], "value", anchor=anchor)


def _at(centre: tuple[float, float], corner: str, share: float) -> tuple[float, float]:
    angle = math.radians(_ANGLES[corner])
    return centre[0] + _RADIUS * share * math.cos(angle), centre[1] + _RADIUS * share * math.sin(angle)


def _closed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [*points, points[0]]
