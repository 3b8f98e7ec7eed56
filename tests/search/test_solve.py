"""The exact solver against brute force over all choices."""

import itertools
import math

import numpy as np
import pytest

from trilemma.search.solve import Option, solve


def brute_force(items, limits):
    best, best_cost = None, math.inf
    for choice in itertools.product(*(range(len(item)) for item in items)):
        picked = [item[c] for item, c in zip(items, choice, strict=True)]
        if all(math.fsum(o.weights[k] for o in picked) <= limit for k, limit in enumerate(limits)):
            cost = math.fsum(o.cost for o in picked)
            if cost < best_cost:
                best, best_cost = list(choice), cost
    return best, best_cost


@pytest.mark.parametrize("seed", range(30))
def test_equals_brute_force_under_several_limits(seed):
    rng = np.random.default_rng(seed)
    count, limits_count = int(rng.integers(1, 7)), int(rng.integers(0, 4))
    cost_scale, weight_scale = 10.0 ** rng.integers(-6, 2), 10.0 ** rng.integers(0, 10)

    def option():
        weights = tuple(float(w) for w in np.round(rng.random(limits_count) * weight_scale))
        return Option(float(rng.random() * cost_scale), weights)

    items = [[option() for _ in range(int(rng.integers(1, 5)))] for _ in range(count)]
    limits = [float(np.round(rng.uniform(0.2, 0.9) * count * weight_scale)) for _ in range(limits_count)]
    expected, expected_cost = brute_force(items, limits)
    found = solve(items, limits)
    if expected is None:
        assert found is None
        return
    assert found is not None
    for k, limit in enumerate(limits):
        assert math.fsum(item[c].weights[k] for item, c in zip(items, found, strict=True)) <= limit
    cost = math.fsum(item[c].cost for item, c in zip(items, found, strict=True))
    assert cost == pytest.approx(expected_cost, rel=1e-9)


def test_a_limit_that_is_met_to_the_byte_holds_exactly():
    items = [[Option(1.0, (1_000_000_001.0,)), Option(0.0, (1_000_000_002.0,))] for _ in range(3)]
    chosen = solve(items, [3_000_000_005.0])
    assert chosen is not None
    assert sum(items[i][c].weights[0] for i, c in enumerate(chosen)) <= 3_000_000_005
    assert sum(chosen) == 2


def test_nothing_fits():
    assert solve([[Option(0.0, (5.0,))]], [4.0]) is None


def test_no_items():
    assert solve([], [1.0]) == []


@pytest.mark.parametrize(
    ("items", "limits"),
    [([[]], [1.0]), ([[Option(1.0, (1.0,))]], []), ([[Option(math.nan, (1.0,))]], [1.0])],
)
def test_bad_input(items, limits):
    with pytest.raises(ValueError, match="item 0"):
        solve(items, limits)
