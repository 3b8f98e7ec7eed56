"""Cost a month of each strategy as the number of requests grows: where another one becomes the cheapest."""

from __future__ import annotations

from pathlib import Path

from trilemma.search.strategies.advise import assess_all
from trilemma.search.strategies.scenario import Scenario, read_scenario

_HALVINGS = 6  # each way from the scenario's own rate, in steps of two
_STEPS = 4


def cost_by_requests(scenario: Scenario | str | Path) -> dict[str, list[tuple[float, float, bool]]]:
    """Strategy -> (requests a day, cost a month, feasible) from 1/64 to 64 times the scenario's rate.

    The peak rate grows with the day's: a busier service is busier in the same minutes.
    """
    given = scenario if isinstance(scenario, Scenario) else read_scenario(scenario)
    found: dict[str, list[tuple[float, float, bool]]] = {}
    for step in range(-_HALVINGS * _STEPS, _HALVINGS * _STEPS + 1):
        factor = 2.0 ** (step / _STEPS)
        workload = given.workload.model_copy(update={
            "requests_per_day": given.workload.requests_per_day * factor,
            "peak_requests_per_s": given.workload.peak_requests_per_s * factor,
        })  # fmt: skip
        for item in assess_all(given.model_copy(update={"workload": workload})):
            point = (workload.requests_per_day, item.total_per_month, item.feasible)
            found.setdefault(item.name, []).append(point)
    return found
