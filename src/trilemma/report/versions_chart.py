"""Versions of a model as points: divergence from the original against memory, and against time."""

from __future__ import annotations

from collections.abc import Sequence

from trilemma.report.plot import Axis, Chart, Mark, Point, Series, chart_row
from trilemma.report.triangle import Version


def versions_chart(versions: Sequence[Version], *, title: str, reference: tuple[float, float] | None = None) -> str:
    """Two panels, KL over bytes and KL over time a token, as a stand-alone SVG document.

    Args:
        versions: those with a KL above zero are drawn; the nearer to the lower left corner, the better.
        reference: bytes and seconds a token of the original, drawn as dashed lines.

    Raises:
        ValueError: none is.
    """
    shown = [version for version in versions if version.kl > 0]
    if not shown:
        raise ValueError("there is no version to draw")
    y = Axis("KL to the original, nats", "", True)
    marks = [[Mark("original", x=at)] for at in reference] if reference else [[], []]
    memory = [Series(v.name, [Point(v.memory_bytes, v.kl)]) for v in shown]
    time = [Series(v.name, [Point(v.time_s, v.kl)]) for v in shown]
    panels = [
        Chart(memory, Axis("weights", "bytes"), y, "Memory", marks[0]),
        Chart(time, Axis("time a token", "s"), y, "Time", marks[1]),
    ]
    return chart_row(panels, title=title)
