"""One level for each item: chosen exactly where losses add, then refined where they do not. Only numbers.

An item is a tensor, a level one of the formats that it may get. What each item alone loses at each level gives the
exact answer of `solve.py`, right as long as losses add (HIGGS, arXiv:2411.17525: above about four bits). Below, they
interact: `evolve` goes on from there by the whole's true loss (EvoPress, arXiv:2410.14649: level-switch mutation, the
best of a generation is the next parent).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilemma.search.solve import Option, solve

Levels = tuple[int, ...]
_MOST_SWITCHES = 3


@dataclass(frozen=True)
class LevelTable:
    """What items lose and take at each level.

    loss: (items, levels), each item alone at this level; takes: (items, levels, limits), what it uses of each limited
    quantity, such as bytes and seconds. A level that an item can not have takes infinitely much.
    """

    loss: NDArray[np.float64]
    takes: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.loss.ndim != 2 or self.takes.shape[:2] != self.loss.shape or self.takes.ndim != 3:
            raise ValueError(f"loss {self.loss.shape} and takes {self.takes.shape} do not match")

    def total(self, levels: Levels) -> NDArray[np.float64]:
        """(limits,) what a choice takes together."""
        return np.asarray(self.takes[np.arange(len(levels)), list(levels)].sum(axis=0))

    def fits(self, levels: Levels, limits: Sequence[float]) -> bool:
        return bool((self.total(levels) <= np.asarray(limits)).all())

    def sum_of_losses(self, levels: Levels) -> float:
        return float(self.loss[np.arange(len(levels)), list(levels)].sum())


def choose(table: LevelTable, limits: Sequence[float]) -> Levels | None:
    """The levels of least summed loss within the limits, proven best; None where nothing fits."""
    possible = [np.flatnonzero(np.isfinite(takes).all(axis=1)) for takes in table.takes]
    items = [
        [Option(float(table.loss[item, level]), tuple(map(float, table.takes[item, level]))) for level in levels]
        for item, levels in enumerate(possible)
    ]
    if not all(items):
        return None
    chosen = solve(items, limits)
    return None if chosen is None else tuple(int(levels[at]) for levels, at in zip(possible, chosen, strict=True))


def evolve(
    table: LevelTable,
    start: Levels,
    limits: Sequence[float],
    loss_of: Callable[[Levels], float],
    *,
    generations: int,
    offspring: int = 8,
    seed: int = 0,
    tell: Callable[[int, float], None] | None = None,
) -> tuple[Levels, float]:
    """Levels of less true loss within the limits, and that loss; `start` where nothing better is found.

    Args:
        loss_of: the true loss of a choice, asked once for each different one.
        tell: called with the generation and the least loss so far.
    """
    rng = np.random.default_rng(seed)
    known: dict[Levels, float] = {start: loss_of(start)}
    best = start
    for generation in range(generations):
        for _ in range(offspring):
            child = mutate(table, best, limits, rng)
            if child not in known:
                known[child] = loss_of(child)
        best = min(known, key=lambda levels: (known[levels], levels))
        if tell is not None:
            tell(generation + 1, known[best])
    return best, known[best]


def mutate(table: LevelTable, levels: Levels, limits: Sequence[float], rng: np.random.Generator) -> Levels:
    """A neighbour within the limits: one to three items take less, then others more, as long as they fit.

    Few switches are likelier than many. The parent itself when no item can move.
    """
    child = list(levels)
    switches = int(min(rng.integers(1, _MOST_SWITCHES + 1, 2)))
    room = np.asarray(limits, dtype=np.float64)
    for _ in range(switches):
        item = _pick(rng, [(i, level) for i, level in _steps(table, child, -1)])
        if item is not None:
            child[item[0]] = item[1]
    lowered = {i for i, (now, then) in enumerate(zip(child, levels, strict=True)) if now != then}
    while True:
        total = table.total(tuple(child))
        fitting = [
            (i, level) for i, level in _steps(table, child, +1)
            if i not in lowered and (total - table.takes[i, child[i]] + table.takes[i, level] <= room).all()
        ]  # fmt: skip
        item = _pick(rng, fitting)
        if item is None:
            break
        child[item[0]] = item[1]
    return tuple(child)


def _steps(table: LevelTable, levels: Sequence[int], way: int) -> list[tuple[int, int]]:
    """(item, its next level up or down by the first limited quantity) of all items that have one."""
    found = []
    for item, now in enumerate(levels):
        takes = table.takes[item, :, 0]
        beyond = np.isfinite(takes) & ((takes > takes[now]) if way > 0 else (takes < takes[now]))
        if beyond.any():
            ranked = np.where(beyond, way * takes, np.inf)
            found.append((item, int(np.argmin(ranked))))
    return found


def _pick(rng: np.random.Generator, found: list[tuple[int, int]]) -> tuple[int, int] | None:
    return found[int(rng.integers(len(found)))] if found else None
