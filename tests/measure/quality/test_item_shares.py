"""Shares of items: published values, coverage by simulation, changes counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from trilemma.measure.quality.item_shares import first_difference, paired_change, share_of_items, standard_error


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (81, 263), (500, 1000)])
def test_wilson_agrees_with_scipy(right, n):
    found = share_of_items([True] * right + [False] * (n - right))
    low, high = binomtest(right, n).proportion_ci(method="wilson")
    assert found.value == right / n
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_the_example_of_newcombe():
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, Statistics in Medicine 17, table I)."""
    found = share_of_items([True] * 81 + [False] * 182)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
def test_wilson_covers_exactly_what_the_binomial_says(share):
    n = 200
    inside = 0.0
    for right in range(n + 1):
        found = share_of_items([True] * right + [False] * (n - right))
        inside += binom.pmf(right, n, share) * (found.low <= share <= found.high)
    assert 0.93 < inside < 0.975


def test_standard_error_is_that_of_lm_eval():
    hits = [1, 0, 0, 1, 1, 0, 1]
    assert standard_error(hits) == pytest.approx(np.std(hits, ddof=1) / np.sqrt(7))
    assert standard_error([1]) == 0


def test_changes_are_counted_each_way():
    before, after = [1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 0]
    found = paired_change(before, after)
    assert (found.gained, found.lost) == (2, 1)
    assert found.interval.value == pytest.approx(1 / 6)
    # Agresti and Min by hand: cells 2.5 and 1.5 of 8 items
    half = 1.959964 * np.sqrt((4 - 1 / 8) / 64)
    assert (found.interval.low, found.interval.high) == pytest.approx((1 / 8 - half, 1 / 8 + half), abs=1e-6)


def test_no_change_is_no_certainty():
    found = paired_change([1, 0] * 50, [1, 0] * 50).interval
    assert found.value == 0
    assert -0.03 < found.low < 0 < found.high < 0.03


def test_the_paired_interval_covers():
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(1000):
        kinds = rng.choice(4, 120, p=[0.5, 0.38, 0.08, 0.04])  # both, none, gained, lost
        found = paired_change((kinds == 0) | (kinds == 3), (kinds == 0) | (kinds == 2)).interval
        inside += found.low <= 0.04 <= found.high
    assert 930 <= inside <= 980


def test_where_answers_part():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [4]) == 0


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="one item"):
        share_of_items([])
    with pytest.raises(ValueError, match="same items"):
        paired_change([1, 0], [1])
