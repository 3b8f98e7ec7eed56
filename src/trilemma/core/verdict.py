"""PASS, FAIL or INCONCLUSIVE: what a 95% interval says of a limit."""

from __future__ import annotations

from typing import Literal

from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.record import Record

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]


class Verdict(Record):
    """The outcome for one limit, with the number it rests on and what would settle it.

    `relative_value` and `relative_ci95` are fractions of the unmodified model (paired where both ran
    interleaved); they are set for relative limits only, and the outcome rests on them.
    """

    limit: Limit
    outcome: Outcome
    threshold: float | None
    baseline: float | None = None
    measurement: Measurement
    reason: str
    settle: str | None = None
    relative_value: float | None = None
    relative_ci95: tuple[float, float] | None = None
