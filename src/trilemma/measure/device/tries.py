"""Many short timings that take turns, so that a slow minute of the machine falls on all of them alike.

The lower quartile of many short tries spread over the whole run is near what a quiet machine gives in the median, and
unlike the minimum it does not depend on how many tries there were. On a machine with busy neighbours most tries are
disturbed, and nearly the least one is what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
Try = Callable[[], float]  # one timing, in seconds

QUIET, DISTURBED = 0.25, 0.02


def typical(samples: Sequence[float], *, noisy: bool = False) -> float:
    """The lower quartile, or nearly the least where the machine was noisy."""
    return float(np.quantile(np.asarray(samples, np.float64), DISTURBED if noisy else QUIET))


def method(noisy: bool) -> str:
    """What `typical` is, in words."""
    return "nearly the least of interleaved tries" if noisy else "lower quartile of interleaved tries"


def take_turns(
    tries: Mapping[Key, Try],
    *,
    rounds: int,
    most_s: float,
    progress: Callable[[float], None] | None = None,
    after_round: Callable[[], object] | None = None,
) -> dict[Key, list[float]]:
    """Every try once a round, in rotating order; the first round is discarded.

    Args:
        rounds: that count.
        most_s: no round begins after it, but three that count are always made.
        progress: called with the share that is done.
        after_round: called then; what watches the machine.

    Returns:
        Samples by key, one a round.
    """
    keys = list(tries)
    found: dict[Key, list[float]] = {key: [] for key in keys}
    began = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 3 and time.perf_counter() - began > most_s:
            break
        first = turn * 7 % max(len(keys), 1)
        for place, key in enumerate([*keys[first:], *keys[:first]]):
            seconds = tries[key]()
            if turn:
                found[key].append(seconds)
            if progress is not None and place % 8 == 0:
                spent = (time.perf_counter() - began) / most_s
                progress(min(1.0, max(spent, (turn + place / len(keys)) / (rounds + 1))))
        if after_round is not None:
            after_round()
    return found
