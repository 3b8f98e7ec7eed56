"""The front against a brute-force definition, with ties, None and NaN."""

import math
import random

import pytest

from trilemma.search.front import pareto_front


def brute_force(points, directions):
    def unknown(p):
        return any(v is None or math.isnan(v) for v in p)

    def better(a, b, d):
        return a < b if d == "lower" else a > b

    on_front = []
    for i, p in enumerate(points):
        if unknown(p):
            continue
        beaten = False
        for q in points:
            if unknown(q):
                continue
            no_worse = not any(better(x, y, d) for x, y, d in zip(p, q, directions, strict=True))
            somewhere = any(better(y, x, d) for x, y, d in zip(p, q, directions, strict=True))
            beaten |= no_worse and somewhere
        if not beaten:
            on_front.append(i)
    return on_front


@pytest.mark.parametrize("seed", range(40))
def test_equals_brute_force_with_ties_and_unknowns(seed):
    rng = random.Random(seed)
    directions = [rng.choice(["lower", "higher"]) for _ in range(rng.randint(1, 4))]
    values = [0.0, 1.0, 2.0, 3.0, None, math.nan, -1.0, math.inf]
    weights = [5, 5, 5, 5, 1, 1, 2, 1]
    points = [[rng.choices(values, weights)[0] for _ in directions] for _ in range(rng.randint(0, 25))]
    assert pareto_front(points, directions) == brute_force(points, directions)


def test_equal_points_stay_together():
    assert pareto_front([(1, 2), (1, 2), (2, 2)], ["lower", "higher"]) == [0, 1]


def test_wrong_number_of_coordinates():
    with pytest.raises(ValueError, match="2 directions"):
        pareto_front([(1,)], ["lower", "higher"])
