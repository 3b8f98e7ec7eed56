"""What each step of a recipe gained, in the recipe's order: the record of `inspect --waterfall`."""

from __future__ import annotations

from typing import Any, Literal

from trilemma.core.environment import Environment
from trilemma.core.measurement import Measurement
from trilemma.core.record import Record


class WaterfallStep(Record):
    """The model after one step. `ratios`: metric -> (after over before this step, low, high), paired in time.

    The first step is the unmodified model itself, with no technique.
    """

    name: str
    technique: str = ""
    settings: dict[str, Any] = {}
    build_s: float = 0.0
    measurements: dict[str, Measurement]
    ratios: dict[str, tuple[float, float | None, float | None]] = {}


class Waterfall(Record):
    """All prefixes of a recipe. Another order could share the same total out differently."""

    schema_version: Literal[1] = 1
    model: str
    recipe: str
    twin: bool
    environment: Environment
    prompt_tokens: int
    output_tokens: int
    steps: tuple[WaterfallStep, ...]
    notes: tuple[str, ...] = ()

    def values(self, metric: str) -> list[float | None]:
        """The metric after each step, the unmodified model first."""
        found = (step.measurements.get(metric) for step in self.steps)
        return [None if item is None else item.value for item in found]
