"""Which rounds of a run the machine was quiet in, judged by the measured work itself.

Neighbours behind a shared cache or a shared memory bus slow a model down by tens of percent for seconds and
show neither in the kernel's account nor in a loop of arithmetic. What feels them is the model: a round in which
all interleaved candidates together took more than 5% longer than at the run's quiet level (the time that a tenth
of the rounds stay below) is set aside, for every candidate, so that ratios stay paired. On a quiet machine nothing
is set aside and the figure is the plain median; times that scatter by 2% on their own lose 0.3% by it.

Other estimators were compared on recorded runs (docs/log.md): plain medians, low quantiles, medians normalised
by a reference loop or by passes over memory, and rounds chosen by those. Left out on purpose: a level
remembered from earlier runs, which one lucky run, another kernel or a colder room would spoil for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

QUIET_QUANTILE = 0.1
SLOWER = 0.05  # a round that took this much longer than the quiet level is set aside
LEAST_ROUNDS = 10  # with fewer there is no level to tell from
LEAST_KEPT = 3
LEAST_SHARE = 0.25  # with less of the rounds quiet, or
MOVED = 0.05  # with the quiet level of one half this far from that of the other, the run is noisy


class Sifted(NamedTuple):
    """kept: (rounds,) True where the machine was quiet; moved: quiet level of the second half over the first, - 1."""

    kept: NDArray[np.bool_]
    moved: float

    @property
    def share_aside(self) -> float:
        """Share of the rounds set aside."""
        return float(1 - self.kept.mean())

    @property
    def reason(self) -> str | None:
        """Why these rounds make a noisy run, or None."""
        if 1 - self.share_aside < LEAST_SHARE:
            return f"{self.share_aside:.0%} of the rounds were disturbed"
        if abs(self.moved) > MOVED:
            return f"the model's own quiet level moved by {self.moved:+.0%}"
        return None


def sift(times: Sequence[ArrayLike]) -> Sifted:
    """The quiet rounds of an interleaved run.

    Args:
        times: one row of seconds a candidate, all of the same rounds; positive.

    Returns:
        With fewer than ten rounds all of them; otherwise at least three.

    Raises:
        ValueError: no rounds.
    """
    table = np.asarray(times, np.float64)  # (candidates, rounds)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"expected a row of times for each candidate, got shape {table.shape}")
    # The geometric mean over candidates: each counts alike, however long it takes.
    slowness = np.log(table / np.quantile(table, QUIET_QUANTILE, axis=1, keepdims=True)).mean(axis=0)
    rounds = slowness.size
    if rounds < LEAST_ROUNDS:
        return Sifted(np.ones(rounds, np.bool_), 0.0)
    level = float(np.quantile(slowness, QUIET_QUANTILE))
    edge = max(level + np.log1p(SLOWER), float(np.sort(slowness)[LEAST_KEPT - 1]))
    return Sifted(slowness <= edge, level_moved(np.exp(slowness)))


def level_moved(times: ArrayLike, quantile: float = QUIET_QUANTILE) -> float:
    """Quiet level of the second half of a run over that of the first, less 1; 0 with fewer than ten entries."""
    data = np.asarray(times, np.float64)
    if data.size < LEAST_ROUNDS:
        return 0.0
    half = data.size // 2
    return float(np.quantile(data[half:], quantile) / np.quantile(data[:half], quantile) - 1)


def by_repetition(values: ArrayLike, repetition: ArrayLike, kept: NDArray[np.bool_]) -> list[float]:
    """The median of each repetition's quiet rounds; a repetition without any is left out.

    Rounds next to each other share their disturbances, so that it is repetitions whose scatter makes an interval.

    Args:
        values: (rounds,) of one quantity.
        repetition: (rounds,) to which each belongs.
        kept: (rounds,) from `sift`.
    """
    data, owners = np.asarray(values, np.float64), np.asarray(repetition)
    return [float(np.median(data[kept & (owners == one)])) for one in np.unique(owners[kept])]


__all__ = ["Sifted", "by_repetition", "level_moved", "sift"]
