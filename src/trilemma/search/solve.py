"""Exact choice of one option per item under linear limits: the multiple-choice knapsack. Only numbers.

    minimise   sum_i cost[i][c_i]
    such that  sum_i weight[i][c_i][k] <= limit[k]   for every k

Solved as a mixed-integer program by HiGHS (scipy), to proven optimality. What an item is (a tensor, a
role), what costs mean (KL) and what is limited (bytes, seconds) is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

_SOLVED, _TIME_LIMIT = 0, 1


@dataclass(frozen=True)
class Option:
    """One way to treat an item: what it costs and how much of each limited quantity it takes."""

    cost: float
    weights: tuple[float, ...]


def solve(
    items: Sequence[Sequence[Option]], limits: Sequence[float], *, time_limit_s: float = 10.0
) -> list[int] | None:
    """The index of the chosen option of each item, or None when no choice satisfies the limits.

    Raises:
        ValueError: an item without options, weights that do not match the limits, or a number that is not finite.
    """
    _validate(items, limits)
    if not items:
        return []
    tightened = [float(limit) for limit in limits]
    for _ in range(4):
        chosen = _solve_once(items, tightened, time_limit_s)
        if chosen is None:
            return None
        excess = [
            math.fsum(item[c].weights[k] for item, c in zip(items, chosen, strict=True)) - limit
            for k, limit in enumerate(limits)
        ]
        if all(over <= 0 for over in excess):
            return chosen
        # HiGHS accepts a relative violation of about 1e-7; bytes are exact, so ask again a little tighter.
        tightened = [limit - 2 * over if over > 0 else limit for limit, over in zip(tightened, excess, strict=True)]
    return None


def _solve_once(items: Sequence[Sequence[Option]], limits: Sequence[float], time_limit_s: float) -> list[int] | None:
    options = [option for item in items for option in item]
    owner = np.repeat(np.arange(len(items)), [len(item) for item in items])
    columns = np.arange(len(options))
    one_each = csr_array((np.ones(len(options)), (owner, columns)), shape=(len(items), len(options)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    if limits:
        # Only what an option takes above its item's least counts: the solver's tolerance is relative to that.
        least = [np.min([option.weights for option in item], axis=0) for item in items]  # items x (limits,)
        above = np.array([option.weights for option in options]).T - np.array(least)[owner].T  # (limits, options)
        room = np.array([limit - math.fsum(low[k] for low in least) for k, limit in enumerate(limits)])
        widest = above.max(axis=1)
        scale = np.where(widest > 0, widest, np.maximum(np.abs(room), 1.0))
        constraints.append(LinearConstraint(above / scale[:, None], -np.inf, room / scale))
    found = milp(
        c=_scaled([option.cost for option in options]), constraints=constraints, integrality=np.ones(len(options)),
        bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
    )  # fmt: skip
    if found.status not in (_SOLVED, _TIME_LIMIT) or found.x is None:
        return None
    starts = np.cumsum([0, *(len(item) for item in items)])
    return [int(np.argmax(found.x[a:b])) for a, b in pairwise(starts)]


def _scaled(costs: Sequence[float]) -> NDArray[np.float64]:
    """Costs near 1: tiny KL sums would drown in the solver's absolute tolerance."""
    values = np.array(costs, dtype=np.float64)
    top = np.abs(values).max()
    return values if top == 0 else values * (1e3 / top)


def _validate(items: Sequence[Sequence[Option]], limits: Sequence[float]) -> None:
    for index, item in enumerate(items):
        if not item:
            raise ValueError(f"item {index} has no options")
        for option in item:
            if len(option.weights) != len(limits):
                raise ValueError(f"item {index} has {len(option.weights)} weights; there are {len(limits)} limits")
            if not math.isfinite(option.cost) or not all(map(math.isfinite, option.weights)):
                raise ValueError(f"item {index} has a cost or weight that is not finite")
