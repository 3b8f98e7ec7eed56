"""Cost a month against requests a day, a line a strategy; those that break a constraint are dashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trilemma.core.advice import Advice
from trilemma.report.plot import Axis, Chart, Mark, Point, Series, chart_row

Curve = Sequence[tuple[float, float, bool]]  # requests a day, cost a month, feasible


def cost_plot(found: Advice, curves: Mapping[str, Curve]) -> str:
    """A stand-alone SVG document.

    Args:
        curves: strategy -> points; a strategy without any cost has no place on the logarithmic axis.
    """
    series = []
    for name, points in curves.items():
        kept = [Point(x, y) for x, y, _ in points if y > 0]
        if kept:
            feasible = found.strategy(name).feasible
            series.append(Series(name if feasible else f"{name} (infeasible)", kept, dashed=not feasible))
    middle = next(iter(curves.values()))
    now = middle[len(middle) // 2][0]
    chart = Chart(
        series, Axis("requests a day", "", True), Axis(f"{found.currency} a month", "", True), "",
        (Mark(x=now, words="the scenario"),), (f"the winner: {found.winner or 'none'}",),
    )  # fmt: skip
    return chart_row([chart], title=found.scenario, width=760, height=380)
