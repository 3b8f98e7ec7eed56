"""Where two measured lines cross, with an interval, or that they do not; numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from trilemma.core.quantity import significant
from trilemma.measure.stats import Interval


@dataclass(frozen=True)
class Crossing:
    """Where `a` and `b` cost the same, along x.

    `at` is None where the lines do not cross within what was measured. `low` and `high` enclose every x at
    which the interval of the ratio holds 1: there, neither is known to be cheaper; None where that reaches
    beyond the measured range (or is empty). `before` and `after` name the cheaper one at either end, None
    where the interval there holds 1.
    """

    a: str
    b: str
    first_x: float
    last_x: float
    at: float | None
    low: float | None
    high: float | None
    before: str | None
    after: str | None
    ratio_first: float  # a over b at either end
    ratio_last: float

    def sentence(self, unit: str = "tokens") -> str:
        """One line in words."""
        ends = f"{_num(self.first_x)} and {_num(self.last_x)} {unit}"
        if self.at is not None and self.before != self.after:
            low = f"below {_num(self.first_x)}" if self.low is None else _num(self.low)
            high = f"above {_num(self.last_x)}" if self.high is None else _num(self.high)
            cheaper = [f"{name} is faster {word}" for name, word in ((self.before, "below"), (self.after, "above"))
                       if name is not None]  # fmt: skip
            return f"{self.a} and {self.b} cross at {_num(self.at)} {unit} [{low}, {high}]: " + (
                ", ".join(cheaper) or "too close to tell them apart at either end"
            )
        if self.before is not None and self.before == self.after:
            other, ratios = self.b, (1 / self.ratio_first, 1 / self.ratio_last)
            if self.before == self.b:
                other, ratios = self.a, (self.ratio_first, self.ratio_last)
            return (
                f"{self.before} is faster than {other} throughout: {significant(ratios[0])} times at "
                f"{_num(self.first_x)} {unit}, {significant(ratios[1])} times at {_num(self.last_x)}"
            )
        if self.before is None and self.after is None:
            return f"{self.a} and {self.b} can not be told apart between {ends}"
        if self.after is not None:
            edge = _num(self.first_x if self.high is None else self.high)
            other, ratio = (self.b, 1 / self.ratio_last) if self.after == self.a else (self.a, self.ratio_last)
            return (
                f"{self.after} is faster than {other} above {edge} {unit}, {significant(ratio)} times at "
                f"{_num(self.last_x)}; below, neither is known to be"
            )
        assert self.before is not None
        edge = _num(self.last_x if self.low is None else self.low)
        other, ratio = (self.b, 1 / self.ratio_first) if self.before == self.a else (self.a, self.ratio_first)
        return (
            f"{self.before} is faster than {other} below {edge} {unit}, {significant(ratio)} times at "
            f"{_num(self.first_x)}; above, neither is known to be"
        )


def crossover(a: str, b: str, xs: Sequence[float], ratios: Sequence[Interval]) -> Crossing:
    """Where the ratio a / b passes 1.

    Between measured points the logarithm of the ratio is taken as straight in the logarithm of x, and so
    are the edges of its 95% interval.

    Args:
        a, b: names of the lines.
        xs: rising and positive, at least one.
        ratios: a over b at each x, paired, with its interval where known.

    Raises:
        ValueError: lengths that differ, or x that do not rise.
    """
    if len(xs) != len(ratios) or not xs:
        raise ValueError(f"{len(xs)} places and {len(ratios)} ratios")
    if any(y <= x for x, y in pairwise(xs)) or xs[0] <= 0 or any(r.value <= 0 for r in ratios):
        raise ValueError("places must rise and ratios be positive")
    at_log = [math.log(x) for x in xs]
    middle = [math.log(ratio.value) for ratio in ratios]
    low_edge = [_edge(ratio.low, ratio.value, -1) for ratio in ratios]
    high_edge = [_edge(ratio.high, ratio.value, +1) for ratio in ratios]
    crossings = _roots(at_log, middle)
    touched = _roots(at_log, low_edge) + _roots(at_log, high_edge) + crossings
    inside = [low <= 0 <= high for low, high in zip(low_edge, high_edge, strict=True)]
    open_before, open_after = inside[0], inside[-1]
    at = math.exp(crossings[len(crossings) // 2]) if crossings else None
    return Crossing(
        a, b, xs[0], xs[-1], at,
        None if open_before or not touched else math.exp(min(touched)),
        None if open_after or not touched else math.exp(max(touched)),
        None if open_before else (a if middle[0] < 0 else b),
        None if open_after else (a if middle[-1] < 0 else b),
        ratios[0].value, ratios[-1].value,
    )  # fmt: skip


def _edge(edge: float | None, value: float, side: int) -> float:
    """Logarithm of an interval's edge; without an interval anything is possible."""
    if edge is None:
        return side * math.inf
    return math.log(edge) if edge > 0 else -math.inf


def _roots(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """Where a line through the points passes 0, rising or falling."""
    found: list[float] = []
    for (x1, y1), (x2, y2) in pairwise(zip(xs, ys, strict=True)):
        if not (math.isfinite(y1) and math.isfinite(y2)):
            continue
        if (y1 < 0) != (y2 < 0):
            found.append(x1 + (x2 - x1) * (-y1) / (y2 - y1))
    return found


def _num(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


__all__ = ["Crossing", "crossover"]
