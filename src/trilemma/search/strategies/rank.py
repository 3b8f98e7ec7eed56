"""The order of feasible strategies and the reasons for it.

What the scenario prefers decides; where two differ by less than `equal_within` in that, the next
criterion does. Nothing is weighted against anything else, so every place has one reason.
"""

from __future__ import annotations

import math

from trilemma.core.advice import Strategy
from trilemma.core.quantity import format_percent, format_quantity, significant
from trilemma.search.strategies.scenario import Preference, Scenario

CRITERIA: tuple[Preference, ...] = ("cost", "quality", "speed", "battery", "effort")


def rank(strategies: list[Strategy], scenario: Scenario) -> list[Strategy]:
    """Feasible strategies, the best first: by the preferred criterion, then by those after it among equals."""
    left = [item for item in strategies if item.feasible]
    order: list[Strategy] = []
    while left:
        best = _best(left, scenario)
        order.append(best)
        left.remove(best)
    return order


def _best(strategies: list[Strategy], scenario: Scenario) -> Strategy:
    equal = strategies
    for criterion in _criteria(scenario):
        least = min(_score(item, criterion) for item in equal)
        equal = [item for item in equal if _is_equal(_score(item, criterion), least, scenario.equal_within)]
        if len(equal) == 1:
            break
    return equal[0]


def _criteria(scenario: Scenario) -> list[Preference]:
    return [scenario.prefer, *(name for name in CRITERIA if name != scenario.prefer)]


def _score(strategy: Strategy, criterion: Preference) -> float:
    """Less is better; what is not known comes last."""
    value = {
        "cost": strategy.total_per_month, "quality": None if strategy.quality is None else -strategy.quality,
        "speed": strategy.answer_s, "battery": strategy.battery_share_per_day, "effort": strategy.setup_days,
    }[criterion]  # fmt: skip
    return math.inf if value is None else value


def _is_equal(value: float, best: float, within: float) -> bool:
    if value == best:
        return True
    if math.isinf(value) or math.isinf(best):
        return False
    return abs(value - best) <= within * max(abs(value), abs(best))


def explain_ranking(order: list[Strategy], scenario: Scenario) -> dict[str, str]:
    """Why each stands where it stands: the criterion that parts it from the next one, with both figures."""
    reasons: dict[str, str] = {}
    for index, item in enumerate(order):
        if index + 1 == len(order):
            reasons[item.name] = "the only feasible one" if index == 0 else "feasible, and behind all the others"
            continue
        reasons[item.name] = _versus(item, order[index + 1], scenario)
    return reasons


def _versus(better: Strategy, worse: Strategy, scenario: Scenario) -> str:
    equal = []
    for criterion in _criteria(scenario):
        ours, theirs = _score(better, criterion), _score(worse, criterion)
        if _is_equal(ours, theirs, scenario.equal_within):
            equal.append(criterion)
            continue
        same = f"{' and '.join(equal)} being equal, " if equal else ""
        shown, other = _figure(better, criterion, scenario), _figure(worse, criterion, scenario)
        return f"before {worse.name}: {same}{criterion} {shown} against {other}"
    return f"equal to {worse.name} in everything that counts; listed first"


def _figure(strategy: Strategy, criterion: Preference, scenario: Scenario) -> str:
    if criterion == "cost":
        return f"{significant(strategy.total_per_month)} {scenario.prices.currency} a month"
    if criterion == "quality":
        return "unknown" if strategy.quality is None else significant(strategy.quality)
    if criterion == "speed":
        return "unknown" if strategy.answer_s is None else f"{format_quantity(strategy.answer_s, 's')} an answer"
    if criterion == "battery":
        share = strategy.battery_share_per_day
        return "none taken" if share is None else f"{format_percent(share)} of a battery a day"
    return f"{significant(strategy.setup_days)} days of work"
