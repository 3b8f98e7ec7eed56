"""How long to go on timing: a number of repetitions, or until the intervals are narrow, or until the time is out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trilemma.measure.timing.speed import SpeedRun

Progress = Callable[[int, int, str], None]

LEAST_REPETITIONS = 3  # whatever the time limit
FIRST_REPETITIONS = 5  # before an interval is looked at
SETTLED = 0.02  # relative half width of the interval of tpot_s at which a run may end
LEAST_RUN_S = 5.0  # and how long it lasts at least: what disturbs a machine comes and goes within seconds
TIME_LIMIT_S = 20.0


def repeat_for(
    run: SpeedRun, repetitions: int, *, time_limit_s: float | None = None, progress: Progress | None = None,
    what: str = "speed",
) -> None:  # fmt: skip
    """Repeat a warm run a number of times, or fewer when the time is out, but at least three."""
    began = time.perf_counter()
    for turn in range(max(1, repetitions)):
        spent = time.perf_counter() - began
        if time_limit_s is not None and turn >= LEAST_REPETITIONS and spent * (turn + 1) / turn > time_limit_s:
            break
        run.repeat()
        if progress is not None:
            progress(turn + 1, repetitions, what)


def repeat_until_settled(
    run: SpeedRun,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    target: float = SETTLED,
    progress: Progress | None = None,
    what: str = "speed",
) -> bool:
    """Repeat a warm run until every candidate's tpot_s is known within `target`, or the time is out.

    At least five repetitions, and at least five seconds where the limit leaves them.

    Returns:
        Whether it settled. Progress counts tenths of seconds.
    """
    began = time.perf_counter()
    total = max(1, round(10 * time_limit_s))
    while True:
        run.repeat(1 if run.repetitions else FIRST_REPETITIONS)
        spent = time.perf_counter() - began
        settled = spent >= min(LEAST_RUN_S, time_limit_s) and run.half_width <= target
        done = settled or spent >= time_limit_s
        if progress is not None:
            progress(total if done else min(round(10 * spent), total), total, what)
        if done:
            return settled
