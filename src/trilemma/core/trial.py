"""A trial: one recipe and everything that was measured of what it built."""

from __future__ import annotations

from typing import Literal

from trilemma.core.measurement import Measurement
from trilemma.core.recipe import Recipe
from trilemma.core.record import Record


class Trial(Record):
    """`status` says how far it came; `reason` why it was dropped or failed.

    `paired_baseline` holds what the unmodified model showed in the same interleaved run, so that
    relative time limits compare neighbours in time.
    """

    name: str
    recipe: Recipe
    status: Literal["baseline", "measured", "dropped", "failed"]
    reason: str = ""
    measurements: dict[str, Measurement] = {}
    paired_baseline: dict[str, Measurement] = {}

    def value(self, metric: str) -> float | None:
        found = self.measurements.get(metric)
        return None if found is None else found.value
