"""PASS, FAIL or INCONCLUSIVE: what a 95% interval says of a limit."""

from __future__ import annotations

from typing import Literal

from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.record import Record

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]


class Verdict(Record):
    """The outcome for one limit, with the number it rests on and what would settle it."""

    limit: Limit
    outcome: Outcome
    threshold: float | None
    baseline: float | None = None
    measurement: Measurement
    reason: str
    settle: str | None = None
