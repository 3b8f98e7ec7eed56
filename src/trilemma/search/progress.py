"""How a long search tells what it is doing: one small record and one callback, with nothing of any terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where the search stands.

    stage: 'load', 'texts', 'baseline', 'plan', 'search', 'run-off', 'confirm' or 'write', and inside of
        these 'build' and 'measure';
    done, total: steps of this stage (total 0 when unknown);
    left_s: seconds that the whole search may still take at most, None when unknown.
    """

    stage: str
    done: int
    total: int
    message: str
    left_s: float | None = None


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """The callback of a caller who does not listen."""
