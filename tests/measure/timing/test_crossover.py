"""Where lines cross, on lines whose crossing is known."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.measure.stats import Interval, median_interval
from trilemma.measure.timing.crossover import crossover

XS = [32, 64, 128, 256, 512]


def band(values, share):
    return [Interval(v, v * (1 - share), v * (1 + share)) for v in values]


def test_power_laws_cross_where_they_should(random_generator):
    for _ in range(20):
        at, slope = float(random_generator.uniform(40, 400)), float(random_generator.choice([-1, 1]))
        slope *= float(random_generator.uniform(0.3, 2))
        share = float(random_generator.uniform(0.01, 0.1))
        found = crossover("a", "b", XS, band([(x / at) ** slope for x in XS], share))
        assert found.at == pytest.approx(at, rel=1e-6)
        # the edges of the band are power laws too: 1 = (x / at)^slope (1 +- share)
        edges = sorted(at * (1 + sign * share) ** (-1 / slope) for sign in (-1, 1))
        if edges[0] > XS[0] and edges[1] < XS[-1]:
            assert (found.low, found.high) == pytest.approx(tuple(edges), rel=1e-6)
            assert (found.before, found.after) == (("a", "b") if slope > 0 else ("b", "a"))
            assert "cross at" in found.sentence()


def test_no_crossing_is_said_so():
    found = crossover("recompute", "cache", XS, band([2, 4, 8, 16, 32], 0.1))
    assert found.at is None
    assert (found.before, found.after) == ("cache", "cache")
    assert found.sentence() == ("cache is faster than recompute throughout: 2.00 times at 32 tokens, 32.0 times at 512")
    other = crossover("recompute", "cache", XS, band([0.5, 0.25, 0.2, 0.1, 0.1], 0.1))
    assert other.sentence().startswith("recompute is faster than cache throughout: 2.00 times")


def test_lines_that_are_equal_can_not_be_told_apart():
    found = crossover("a", "b", XS, band([1.01, 0.99, 1.02, 0.98, 1.0], 0.1))
    assert (found.before, found.after, found.low, found.high) == (None, None, None, None)
    assert "can not be told apart" in found.sentence() or "too close" in found.sentence()


def test_one_open_end():
    found = crossover("a", "b", XS, band([1.02, 1.5, 2, 3, 4], 0.1))
    assert (found.at, found.before, found.after, found.low) == (None, None, "b", None)
    assert 32 < found.high < 64
    assert f"b is faster than a above {found.high:.3g}" in found.sentence()
    mirrored = crossover("a", "b", XS, band([4, 3, 2, 1.5, 1.02], 0.1))
    assert (mirrored.before, mirrored.after, mirrored.high) == ("b", None, None)
    assert 256 < mirrored.low < 512


def test_without_intervals_nothing_is_claimed():
    found = crossover("a", "b", [1, 10], [Interval(0.5, None, None), Interval(2, None, None)])
    assert found.at == pytest.approx(10**0.5)
    assert (found.low, found.high, found.before, found.after) == (None, None, None, None)


def test_the_interval_holds_the_truth(random_generator):
    """Noisy repetitions of two known lines: the crossing lies inside in nearly all runs."""
    held = 0
    for _ in range(100):
        ratios = []
        for x in XS:
            noise = np.exp(random_generator.normal(0, 0.05, (2, 9)))
            ratios.append(median_interval((x / 128) * noise[0] / noise[1]))
        found = crossover("a", "b", XS, ratios)
        held += found.low is not None and found.high is not None and found.low <= 128 <= found.high
    assert held >= 88


@pytest.mark.parametrize(("xs", "ratios"), [([], []), ([2, 1], [1, 1]), ([1, 2], [1]), ([0, 1], [1, 1]), ([1], [-1])])
def test_places_must_rise(xs, ratios):
    with pytest.raises(ValueError, match=r"places|ratios"):
        crossover("a", "b", xs, [Interval(r, r, r) for r in ratios])
