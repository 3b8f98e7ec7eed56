"""How long to go on timing: a number of repetitions, or until the intervals are narrow, or until the time is out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trilemma.measure.timing.speed import SpeedRun

Progress = Callable[[int, int, str], None]

LEAST_REPETITIONS = 3  # whatever the time limit
FIRST_REPETITIONS = 5  # before an interval is looked at
SETTLED = 0.02  # relative half width of the interval of tpot_s at which a run may end
LEAST_RUN_S = 5.0  # and how long it lasts at least: what disturbs a machine comes and goes within seconds
MOST_ASIDE = 0.5  # with more of the rounds disturbed it goes on to its limit: the longer, the steadier
TIME_LIMIT_S = 20.0


def repeat_for(
    runs: Sequence[SpeedRun],
    repetitions: int,
    *,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
    what: str = "speed",
) -> None:
    """Repeat warm runs in turn a number of times, or fewer when the time is out, but at least three."""
    began = time.perf_counter()
    for turn in range(max(1, repetitions)):
        spent = time.perf_counter() - began
        if time_limit_s is not None and turn >= LEAST_REPETITIONS and spent * (turn + 1) / turn > time_limit_s:
            break
        for run in runs:
            run.repeat()
        if progress is not None:
            progress(turn + 1, repetitions, what)


def repeat_until_settled(
    runs: Sequence[SpeedRun],
    *,
    time_limit_s: float | None = None,
    target: float = SETTLED,
    progress: Progress | None = None,
    what: str = "speed",
) -> bool:
    """Repeat warm runs in turn until every candidate's tpot_s is known within `target`, or the time is out.

    At least five repetitions, and at least five seconds a run where the limit leaves them. Where most rounds
    were disturbed, the time is used up.

    Args:
        runs: taking turns, a repetition each.
        time_limit_s: 20 s a run where None.
        target: relative half width of each interval.
        progress: called with tenths of seconds.

    Returns:
        Whether all settled.
    """
    began = time.perf_counter()
    limit = TIME_LIMIT_S * len(runs) if time_limit_s is None else time_limit_s
    total = max(1, round(10 * limit))
    while True:
        for run in runs:
            run.repeat()
        spent = time.perf_counter() - began
        if progress is not None:
            progress(min(round(10 * spent), total), total, what)
        if min(run.repetitions for run in runs) < FIRST_REPETITIONS:
            continue
        enough = spent >= min(LEAST_RUN_S * len(runs), limit)
        settled = enough and all(run.half_width <= target and run.share_aside <= MOST_ASIDE for run in runs)
        if settled or spent >= limit:
            if progress is not None:
                progress(total, total, what)
            return settled
