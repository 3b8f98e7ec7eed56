"""Shares of items that are right or not: a task's questions, a generation check's answers.

Items are taken as independent, so the intervals are those of a binomial share and of its paired change; shares
of tokens, which hang together within a document, belong to `measure.stats`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trilemma.measure.stats import Interval

Z_975 = 1.959963984540054


class PairedChange(NamedTuple):
    """How a share changed on the same items: the difference with its interval, and the items that moved."""

    interval: Interval
    gained: int
    lost: int


def share_of_items(hits: ArrayLike) -> Interval:
    """The share of items that hit, with Wilson's score interval (Wilson 1927, JASA 22), 95%.

    It covers well from a few items on and at shares of 0 and 1, where the normal interval is empty.

    Raises:
        ValueError: no items.
    """
    right = np.asarray(hits, np.bool_)
    if right.size == 0:
        raise ValueError("a share needs at least one item")
    n, share = right.size, float(right.mean())
    z2 = Z_975**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_975 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def standard_error(hits: ArrayLike) -> float:
    """lm-eval's acc_stderr: the sample deviation over the root of the number of items; 0 for one item."""
    right = np.asarray(hits, np.float64)
    return float(right.std(ddof=1) / math.sqrt(right.size)) if right.size > 1 else 0.0


def paired_change(before: ArrayLike, after: ArrayLike) -> PairedChange:
    """The share after less the share before, on the same items, with a 95% interval.

    Agresti and Min 2005 (Statistics in Medicine 24): Wald's interval of a paired difference after half an item is
    added to each of the four cells, so that no change at all still leaves an interval.

    Raises:
        ValueError: different numbers of items, or none.
    """
    old, new = np.asarray(before, np.bool_), np.asarray(after, np.bool_)
    if old.shape != new.shape or old.size == 0:
        raise ValueError(f"a paired change needs the same items twice, got {old.shape} and {new.shape}")
    gained, lost = int((new & ~old).sum()), int((old & ~new).sum())
    n = old.size + 2
    up, down = gained + 0.5, lost + 0.5
    centre = (up - down) / n
    half = Z_975 * math.sqrt(up + down - (up - down) ** 2 / n) / n
    change = (gained - lost) / old.size
    interval = Interval(change, max(-1.0, min(change, centre - half)), min(1.0, max(change, centre + half)))
    return PairedChange(interval, gained, lost)


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The index of the first token that differs, the end of the shorter one included; None when equal."""
    if tuple(first) == tuple(second):
        return None
    same: NDArray[np.bool_] = np.asarray([a == b for a, b in zip(first, second, strict=False)], np.bool_)
    return int(np.argmin(same)) if same.size and not same.all() else min(len(first), len(second))
