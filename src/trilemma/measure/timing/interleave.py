"""Any timed cases, interleaved: for questions that are not one request on one engine.

`speed.py` times requests; here a case is a function that returns the seconds of its quantities, so
that a batch, half a prompt or another model take their turns in the same rounds. Ratios are paired
by round; the first round is discarded, and of ten and more those in which the machine was disturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trilemma.measure.timing.noise import ReferenceLoop
from trilemma.measure.timing.quiet import sift

Case = Callable[[], Mapping[str, float]]
Progress = Callable[[int, int, str], None]

LEAST_ROUNDS = 3


@dataclass
class Rounds:
    """samples[case][quantity]: seconds, one entry a quiet round; `noisy` says why the machine is not to be trusted.

    set_aside[case][quantity] holds those of the disturbed rounds.
    """

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    noisy: str | None = None
    set_aside: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def of(self, case: str, quantity: str) -> NDArray[np.float64]:
        return np.asarray(self.samples[case][quantity], np.float64)


def interleave(
    cases: Mapping[str, Case],
    *,
    threads: int,
    rounds: int = 15,
    time_limit_s: float = 30.0,
    progress: Progress | None = None,
    what: str = "interleaved rounds",
) -> Rounds:
    """Run all cases in turn, again and again; who goes first rotates.

    Args:
        cases: each returns seconds by quantity.
        threads: of the reference loop that watches the machine.
        rounds: after a discarded one.
        time_limit_s: no round begins after it, but three are always made.
        progress: called with (rounds done, rounds, `what`).
    """
    names: Sequence[str] = list(cases)
    found = Rounds({name: {} for name in names})
    began = time.perf_counter()
    with ReferenceLoop(threads) as loop:
        for name in names:
            cases[name]()
        loop.probe()
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.perf_counter() - began > time_limit_s:
                break
            first = turn % len(names)
            for name in [*names[first:], *names[:first]]:
                for quantity, seconds in cases[name]().items():
                    found.samples[name].setdefault(quantity, []).append(seconds)
            loop.probe()
            if progress is not None:
                progress(turn + 1, rounds, what)
        found.noisy = loop.reason
    return _quiet(found)


def _quiet(found: Rounds) -> Rounds:
    """Without the rounds in which the machine was disturbed, for all cases alike."""
    about = sift([values for quantities in found.samples.values() for values in quantities.values()])

    def part(chosen: NDArray[np.bool_]) -> dict[str, dict[str, list[float]]]:
        return {
            case: {quantity: np.asarray(values)[chosen].tolist() for quantity, values in quantities.items()}
            for case, quantities in found.samples.items()
        }

    return Rounds(part(about.kept), found.noisy or about.reason, part(~about.kept))
