"""Axes of stand-alone charts: what they say, where a value lies on them, and which ticks they carry."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trilemma.core.quantity import format_quantity
from trilemma.report.svg import linear_ticks, log_ticks

_UNITS = ("bytes", "s", "J", "W", "ratio")  # those that a quantity is scaled in


@dataclass(frozen=True)
class Axis:
    """What an axis says; `unit` as in metrics ('s', 'bytes', 'ratio': scaled and written at each tick)."""

    label: str
    unit: str = ""
    log: bool = False
    ticks: Sequence[float] = ()  # those that are wanted instead of round ones
    start: float | None = None  # where a linear axis begins, such as 0


class Scale:
    """Values of one axis to positions in the picture."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self._start, self._end = axis, start, end
        low, high = min(values), max(values)
        if axis.log:
            low, high = math.log10(low), math.log10(high)
        pad = 0.05 * (high - low) or 0.5 * (1.0 if axis.log else abs(high) or 1.0)
        self.low, self.high = low - pad, high + pad
        if not axis.log and min(values) >= 0:
            self.low = max(0.0, self.low)
            if self.low < 0.35 * self.high:
                self.low = 0.0  # an axis that nearly begins at 0 should
        if not axis.log and axis.start is not None:
            self.low = axis.start

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self.axis.log else value
        return self._start + (place - self.low) / (self.high - self.low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Values of the axis at which a line is drawn, rising."""
        if self.axis.log:
            low, high = 10**self.low, 10**self.high
            found = list(self.axis.ticks) or _dense_log_ticks(low, high)
        else:
            low, high = self.low, self.high
            found = list(self.axis.ticks) or linear_ticks(low, high)
        slack = 1e-9 * (high - low)
        return [tick for tick in found if low - slack <= tick <= high + slack]

    def words(self, tick: float) -> str:
        unit = self.axis.unit
        text = format_quantity(tick, unit) if unit in _UNITS else f"{tick:,.6g}"
        return re.sub(r"(\.\d*?)0+(?=\D|$)", r"\1", text).replace(". ", " ").replace(".%", "%").rstrip(".")


def _dense_log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them (or 1.5, 3, 7 as well) where there are few."""
    decades = math.log10(high / low)
    if decades >= 3:
        return log_ticks(low, high)
    steps = (1, 2, 5) if decades > 0.9 else (1, 1.5, 2, 3, 4, 5, 7)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**exponent for exponent in exponents for step in steps]
