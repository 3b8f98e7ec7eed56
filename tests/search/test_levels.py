"""Levels of items against brute force, and the evolutionary step against losses that do not add."""

import itertools

import numpy as np
import pytest

from trilemma.search.levels import LevelTable, choose, evolve, mutate


def table_of(rng, items=5, levels=4, limits=2):
    takes = np.sort(rng.uniform(1, 10, (items, levels, limits)), axis=1)
    loss = -np.sort(-(10 ** rng.uniform(-4, 0, (items, levels))), axis=1)
    return LevelTable(loss, takes)


def all_within(table, limits):
    for levels in itertools.product(range(table.loss.shape[1]), repeat=len(table.loss)):
        if table.fits(levels, limits):
            yield levels


@pytest.mark.parametrize("seed", range(6))
def test_chooses_as_brute_force_does(seed):
    rng = np.random.default_rng(seed)
    table = table_of(rng)
    limits = table.takes.min(axis=1).sum(axis=0) * rng.uniform(1.1, 2.0, 2)
    least = min(table.sum_of_losses(levels) for levels in all_within(table, limits))
    chosen = choose(table, limits)
    assert table.fits(chosen, limits)
    assert table.sum_of_losses(chosen) == pytest.approx(least, rel=1e-9)


def test_nothing_fits_and_levels_that_are_not_to_be_had():
    table = table_of(np.random.default_rng(1), items=3)
    assert choose(table, (0.1, 1e9)) is None
    takes = table.takes.copy()
    takes[0, 1:] = np.inf  # this item has one level only
    only = LevelTable(table.loss, takes)
    assert choose(only, (1e9, 1e9)) == (0, 3, 3)
    rng = np.random.default_rng(0)
    assert all(mutate(only, (0, 2, 1), (1e9, 1e9), rng)[0] == 0 for _ in range(50))


@pytest.mark.parametrize("seed", range(4))
def test_every_mutant_fits(seed):
    rng = np.random.default_rng(seed)
    table = table_of(rng)
    limits = table.takes.min(axis=1).sum(axis=0) * 1.5
    levels = choose(table, limits)
    seen = set()
    for _ in range(200):
        levels = mutate(table, levels, limits, rng)
        assert table.fits(levels, limits)
        seen.add(levels)
    assert len(seen) > 5


@pytest.mark.parametrize("seed", range(4))
def test_evolution_finds_what_adding_up_misses(seed):
    """Two items lose far more together than apart, which sums of losses can not know."""
    rng = np.random.default_rng(seed)
    table = table_of(rng, limits=1)
    limits = table.takes.min(axis=1).sum(axis=0) * 1.6
    pairs = rng.uniform(0, 1, (len(table.loss), len(table.loss)))
    asked = []

    def loss_of(levels):
        asked.append(levels)
        own = np.array([table.loss[i, level] for i, level in enumerate(levels)])
        return float(own.sum() + own @ pairs @ own * 5)

    start = choose(table, limits)
    told = []
    best, loss = evolve(table, start, limits, loss_of, generations=30, seed=seed, tell=lambda n, x: told.append((n, x)))
    assert len(asked) == len(set(asked))  # nothing is measured twice
    assert table.fits(best, limits)
    least = min(map(loss_of, all_within(table, limits)))
    assert loss <= loss_of(start)
    assert loss == pytest.approx(least, rel=0.05)
    assert [n for n, _ in told] == list(range(1, 31))
    assert all(b <= a for (_, a), (_, b) in itertools.pairwise(told))
    again = evolve(table, start, limits, loss_of, generations=30, seed=seed)
    assert again == (best, loss)
