"""One measured, estimated or unavailable number, with everything needed to believe it or not."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from trilemma.core.metric import Direction, resolve_metric
from trilemma.core.record import Record

Source = Literal["measured", "estimated", "unavailable"]
Scope = Literal["package", "dram", "gpu", "soc", "wall", "process"]


class Measurement(Record):
    """A number with its unit, source, 95% interval and raw samples.

    `conditions` states what the value holds for ("prompt_tokens": 512, "context": 512, ...).
    `set_aside` keeps raw values that the value is not made of, because the machine was disturbed.
    An unavailable measurement has no value and always a reason; nothing writes 0 for unknown.
    """

    metric: str
    value: float | None
    unit: str
    direction: Direction
    source: Source
    method: str = ""
    sensor: str | None = None
    scope: Scope = "process"
    ci95: tuple[float, float] | None = None
    n: int = 0
    samples: tuple[float, ...] = ()
    set_aside: tuple[float, ...] = ()
    window_s: float | None = None
    noisy: bool = False
    reason: str | None = None
    conditions: dict[str, str | int | float] = {}

    @model_validator(mode="after")
    def _unavailable_has_a_reason(self) -> Measurement:
        if (self.source == "unavailable") != (self.value is None):
            raise ValueError("a measurement has no value exactly when its source is 'unavailable'")
        if self.source == "unavailable" and not self.reason:
            raise ValueError("an unavailable measurement needs a reason")
        return self

    @classmethod
    def of(
        cls,
        metric: str,
        value: float,
        *,
        source: Source = "measured",
        method: str = "",
        sensor: str | None = None,
        scope: Scope = "process",
        ci95: tuple[float, float] | None = None,
        n: int = 1,
        samples: tuple[float, ...] = (),
        set_aside: tuple[float, ...] = (),
        window_s: float | None = None,
        noisy: bool = False,
        conditions: dict[str, str | int | float] | None = None,
    ) -> Measurement:
        """A measured (or estimated) value; unit and direction come from the metric's table."""
        known = resolve_metric(metric)
        return cls(
            metric=known.name, value=float(value), unit=known.unit, direction=known.direction, source=source,
            method=method, sensor=sensor, scope=scope, ci95=ci95, n=n, samples=samples, set_aside=set_aside,
            window_s=window_s, noisy=noisy, conditions=conditions or {},
        )  # fmt: skip

    @classmethod
    def unavailable(cls, metric: str, reason: str, *, sensor: str | None = None) -> Measurement:
        known = resolve_metric(metric)
        return cls(
            metric=known.name, value=None, unit=known.unit, direction=known.direction,
            source="unavailable", sensor=sensor, reason=reason,
        )  # fmt: skip

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval; an exact count (bytes) is its own interval; None when unknown."""
        if self.ci95 is not None:
            return self.ci95
        if self.value is not None and self.unit == "bytes" and self.source == "measured":
            return (self.value, self.value)
        return None
