"""What a recipe will cost, before anything is built: bytes exactly by arithmetic, times roughly.

Bytes decide what is dropped without building it. Times only order and plan; no verdict rests on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trilemma.core.errors import UnsupportedModelError
from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.recipe import Recipe
from trilemma.formats.pack import format_bytes
from trilemma.model.cost import kv_bytes, parameter_count, weights_bytes
from trilemma.model.model import Model
from trilemma.search.memory_outlook import forecast_foreseen_engine
from trilemma.techniques.cost_twin import Foreseen, foresee

BYTE_METRICS = ("weights_bytes", "engine_memory_bytes", "peak_memory_bytes", "artifact_bytes", "kv_bytes_per_token")


@dataclass(frozen=True)
class PredictedBytes:
    """Bytes that a recipe leaves at least: `weights_bytes` exactly, and what the native engine holds; the others are
    lower bounds (scratch and code come on top).

    engine_bytes: weights, cache and scratch as the native engine will count them; None for other runtimes.

    exact: False for recipes that choose shapes by what they find in the weights; the bytes are then about right.
    """

    weights_bytes: int
    kv_bytes: int
    kv_bytes_per_token: float
    exact: bool = True
    engine_bytes: int | None = None

    def least(self, metric: str) -> float:
        """The least value that the metric can take."""
        if metric == "kv_bytes_per_token":
            return self.kv_bytes_per_token
        if metric == "engine_memory_bytes" and self.engine_bytes is not None:
            return self.engine_bytes
        if metric in ("engine_memory_bytes", "peak_memory_bytes"):
            return self.weights_bytes + self.kv_bytes
        return self.weights_bytes


def predict_bytes(model: Model, recipe: Recipe, context: int, *, runtime: str = "native") -> PredictedBytes:
    """Bytes of the model that the recipe would make, with a KV cache of `context` positions.

    Raises:
        RecipeError: a recipe whose result is not known before it is built.
    """
    seen = foresee(model, recipe)
    weights = weights_bytes(seen.config, lambda name: seen.formats.get(name) or model.format_of(name), format_bytes)
    cache = kv_bytes(seen.config, seen.kv_cache, context)
    return PredictedBytes(weights, cache, cache / context, seen.exact, _engine_bytes(model, seen, context, runtime))


def _engine_bytes(model: Model, seen: Foreseen, context: int, runtime: str) -> int | None:
    """None where the native engine is not asked about, or can not be opened like this: building it says why."""
    if runtime != "native" or context > seen.config.max_context:
        return None
    try:
        return forecast_foreseen_engine(model, seen, context).total_bytes
    except UnsupportedModelError:
        return None


def impossible(predicted: PredictedBytes, limits: Sequence[Limit], baseline: Mapping[str, Measurement]) -> Limit | None:
    """The first limit on bytes that the recipe can not keep, by arithmetic alone; none where it is not exact."""
    if not predicted.exact:
        return None
    for limit in limits:
        if limit.metric not in BYTE_METRICS:
            continue
        known = baseline.get(limit.metric)
        if limit.relative and (known is None or known.value is None):
            continue
        threshold = limit.threshold(None if known is None else known.value)
        if predicted.least(limit.metric) > threshold:
            return limit
    return None


class BuildTimes:
    """Seconds that building takes, learned from what was built: per parameter, apart for each technique."""

    _FIRST_GUESS_S_PER_PARAMETER = {"gptq": 3e-6, "rtn": 2e-7, "hqq": 1e-6, "sign-rounding": 3e-5}

    def __init__(self, model: Model) -> None:
        self._parameters = parameter_count(model.config)
        self._seen: dict[str, float] = {}

    def expect_s(self, recipe: Recipe) -> float:
        names = {step.technique for step in recipe.steps}
        return sum(
            self._seen.get(name, self._FIRST_GUESS_S_PER_PARAMETER.get(name, 1e-8) * self._parameters) for name in names
        )

    def learn(self, recipe: Recipe, seconds: float) -> None:
        for name in {step.technique for step in recipe.steps} & set(self._FIRST_GUESS_S_PER_PARAMETER):
            self._seen[name] = max(seconds, 0.8 * self._seen.get(name, 0.0))
