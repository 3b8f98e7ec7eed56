"""A hard requirement on a metric: 'weights<=50%', 'tpot<=20ms', 'peak_memory<=400MB', 'decode>=30'.

`%` is relative to the unmodified model on the same device, except for metrics that are
fractions already (`ppl_increase<=2%`, `top1_agreement>=95%`), where it is just a hundredth.
MB is 10^6 bytes; MiB 2^20.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from trilemma.core.errors import LimitError, UnknownNameError
from trilemma.core.metric import Metric, resolve_metric
from trilemma.core.record import Record

_PATTERN = re.compile(r"^\s*([A-Za-z_][\w/.\-]*)\s*(<=|>=|=<|=>|<|>)\s*([0-9.]+(?:[eE][+-]?\d+)?)\s*([A-Za-z%/]*)\s*$")

_UNITS: dict[str, dict[str, float]] = {
    "bytes": {"": 1, "b": 1, "bytes": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "s": {"": 1, "s": 1, "ms": 1e-3, "us": 1e-6, "min": 60, "m": 60},
    "J": {"": 1, "j": 1, "mj": 1e-3, "kj": 1e3, "wh": 3600},
    "W": {"": 1, "w": 1, "mw": 1e-3, "kw": 1e3},
    "h": {"": 1, "h": 1, "min": 1 / 60, "d": 24},
    "tokens/s": {"": 1, "tokens/s": 1, "tok/s": 1, "t/s": 1},
    "tokens": {"": 1, "tokens": 1},
    "ratio": {"": 1},
    "nats": {"": 1, "nats": 1},
    "bits/byte": {"": 1, "bits/byte": 1},
}


class Limit(Record):
    """One hard requirement. `value` is in the metric's unit, or a fraction of the baseline when `relative`."""

    metric: str
    op: Literal["<=", ">="]
    value: float
    relative: bool
    text: str

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Read 'metric<=number[unit|%]'.

        Raises:
            LimitError: the form, the metric, the unit or the number can not be used.
        """
        match = _PATTERN.match(text)
        if not match:
            raise LimitError(
                f"Can not read the limit '{text}'. Expected METRIC<=NUMBER[UNIT] or METRIC>=NUMBER[UNIT], "
                "for example 'weights<=50%', 'tpot<=20ms', 'peak_memory<=400MB', 'decode>=30'."
            )
        name, op, number, unit = match.groups()
        if not unit and name.endswith("_ms"):
            unit = "ms"
        try:
            metric = resolve_metric(name)
        except UnknownNameError as error:
            raise LimitError(f"In the limit '{text}': {error}") from None
        try:
            value = float(number)
        except ValueError:
            raise LimitError(f"In the limit '{text}': '{number}' is not a number.") from None
        if not math.isfinite(value):
            raise LimitError(f"In the limit '{text}': '{number}' is not a finite number.")
        side: Literal["<=", ">="] = "<=" if "<" in op else ">="
        if (side == "<=") != (metric.direction == "lower"):
            raise LimitError(
                f"In the limit '{text}': {metric.direction} {metric.name} is better, so the limit must be "
                f"'{name}{'<=' if metric.direction == 'lower' else '>='}{number}{unit}'."
            )
        relative = unit == "%" and metric.unit != "ratio"
        return cls(metric=metric.name, op=side, value=value * _scale(text, unit, metric), relative=relative, text=text)

    def threshold(self, baseline: float | None) -> float:
        """The limit in the metric's unit. Raises LimitError when it is relative and there is no baseline."""
        if not self.relative:
            return self.value
        if baseline is None:
            raise LimitError(
                f"The limit '{self.text}' is relative to the unmodified model, which could not be measured here. "
                "Give it as an absolute value."
            )
        return self.value * baseline


def _scale(text: str, unit: str, metric: Metric) -> float:
    if unit == "%":
        return 0.01
    factors = _UNITS[metric.unit]
    if unit.lower() not in factors:
        valid = [name for name in factors if name] + ["%"]
        raise LimitError(
            f"In the limit '{text}': unit '{unit}' does not fit {metric.name}, which is in {metric.unit}. "
            f"Valid units: {', '.join(valid)}."
        )
    return factors[unit.lower()]
