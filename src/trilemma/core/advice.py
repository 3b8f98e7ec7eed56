"""Strategies weighed against a scenario, and what would change the ranking: the record of `trilemma advise`."""

from __future__ import annotations

from typing import Literal

from trilemma.core.record import Record

StrategyKind = Literal["device", "server", "remote", "cascade"]


class Failure(Record):
    """One hard constraint that a strategy breaks."""

    constraint: str
    text: str


class Strategy(Record):
    """One strategy and its figures. Times are those of the slowest device that must be served, or of the slow path.

    cost_per_month: by what is paid for; decided_by: the device that the times and the battery are those of;
    close: limits that hold for the prediction and not for all of its interval.
    """

    name: str
    kind: StrategyKind
    ttft_s: float | None
    tpot_s: float | None
    answer_s: float | None
    energy_j_per_request: float | None
    battery_share_per_day: float | None
    cost_per_month: dict[str, float]
    setup_days: float
    quality: float | None
    quality_source: str
    available: float
    decided_by: str = ""
    failures: tuple[Failure, ...] = ()
    close: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        return not self.failures

    @property
    def total_per_month(self) -> float:
        return sum(self.cost_per_month.values())


class Swap(Record):
    """An input and where the winner changes. `becomes` is None where nothing is feasible any more.

    now, threshold: numbers; for a choice that is no number they are words.
    """

    input: str
    now: float | str
    threshold: float | str
    direction: Literal["above", "below", "as"]
    becomes: str | None


class Advice(Record):
    """The whole answer; `ranking` names feasible strategies, the best first, each with why it stands there."""

    schema_version: Literal[1] = 1
    scenario: str
    question: str
    quality_means: str
    currency: str
    strategies: tuple[Strategy, ...]
    ranking: tuple[str, ...]
    reasons: dict[str, str]
    swaps: tuple[Swap, ...]
    steady: tuple[str, ...]
    assumptions: dict[str, str]

    @property
    def winner(self) -> str | None:
        return self.ranking[0] if self.ranking else None

    def strategy(self, name: str) -> Strategy:
        return next(item for item in self.strategies if item.name == name)
