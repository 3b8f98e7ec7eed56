"""Records of `trilemma eval` and `trilemma compare`: plain, versioned, with the environment."""

from __future__ import annotations

from trilemma.core.environment import Environment
from trilemma.core.measurement import Measurement
from trilemma.core.record import Record

SCHEMA_VERSION = 1


class DomainRow(Record):
    """Quality on one domain; 'all' pools the domains where there are several."""

    domain: str
    documents: int
    tokens: int
    measurements: dict[str, Measurement]


class EvaluateResult(Record):
    """Quality of one model, with what it was compared to."""

    schema_version: int = SCHEMA_VERSION
    model: str
    reference: str | None
    context: int
    prepare: str
    environment: Environment
    rows: tuple[DomainRow, ...]
    notes: tuple[str, ...] = ()


class CompareRow(Record):
    """One model's figures, and those paired to the first: metric -> (ratio, low, high)."""

    name: str
    measurements: dict[str, Measurement]
    relative: dict[str, tuple[float, float | None, float | None]]


class CompareResult(Record):
    """Models side by side; the first is the reference."""

    schema_version: int = SCHEMA_VERSION
    context: int | None
    environment: Environment
    rows: tuple[CompareRow, ...]
    notes: tuple[str, ...] = ()
