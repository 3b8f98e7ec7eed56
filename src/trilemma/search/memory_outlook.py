"""What a model would hold in each scheme: the arithmetic of its recipe, then that of engine and process.

Nothing is built and no weight is read. Schemes whose result is not known before the work is done are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from trilemma.core.environment import usable_cores
from trilemma.measure.memory.forecast import MemoryForecast, forecast_memory, forecast_memory_of
from trilemma.model.model import Activation, Model
from trilemma.runtime.engine import KvCache
from trilemma.runtime.memory_forecast import ActivationOf, EngineMemoryForecast, FormatOf, forecast_engine_of
from trilemma.search.forecast import AS_IT_IS
from trilemma.techniques.cost_twin import Foreseen, foresee
from trilemma.techniques.schemes import scheme_to_recipe


def forecast_schemes_memory(
    model: Model,
    *,
    schemes: Sequence[str] = (AS_IT_IS,),
    prompt_tokens: int,
    output_tokens: int,
    kv: KvCache | None = None,
    threads: int | None = None,
    empty_bytes: int | None = None,
) -> dict[str, MemoryForecast]:
    """Engine and process of the model in each scheme, on the native engine with room for exactly these lengths.

    Args:
        schemes: names as `trilemma list schemes` has them; 'as it is' is the model's own form.
        kv: cache policy of all; by default the scheme's, or the model's own.
        threads: all usable cores by default; they cost a process their stacks and the engine nothing.
        empty_bytes: of a process that opened nothing; by default one is started and measured.

    Raises:
        RecipeError: a scheme that can not be read, or whose result can not be known beforehand.
        InputError: lengths that the model's context does not hold.
        UnsupportedModelError: shapes that the engine can not run.
    """
    workers = threads or usable_cores()

    def of(scheme: str) -> MemoryForecast:
        if scheme == AS_IT_IS:
            return forecast_memory(
                model, prompt_tokens=prompt_tokens, output_tokens=output_tokens, kv=kv, threads=workers,
                empty_bytes=empty_bytes,
            )  # fmt: skip
        seen = foresee(model, scheme_to_recipe(scheme))
        return forecast_memory_of(
            seen.config, *_forms(model, seen), prompt_tokens=prompt_tokens, output_tokens=output_tokens,
            kv=kv or cast(KvCache, seen.kv_cache), threads=workers, empty_bytes=empty_bytes, exact=seen.exact,
        )  # fmt: skip

    return {scheme: of(scheme) for scheme in schemes}


def forecast_foreseen_engine(model: Model, seen: Foreseen, context: int) -> EngineMemoryForecast:
    """What the engine would count for the model that a recipe leaves, at a context.

    Raises:
        InputError: a context that the model does not have.
        UnsupportedModelError: shapes that the engine can not run.
    """
    kv = cast(KvCache, seen.kv_cache)
    return forecast_engine_of(seen.config, *_forms(model, seen), context=context, kv=kv)


def _forms(model: Model, seen: Foreseen) -> tuple[FormatOf, ActivationOf]:
    def format_of(name: str) -> str:
        return seen.formats.get(name) or model.format_of(name)

    def activation_of(name: str) -> Activation:
        return seen.activations.get(name) or model.linear(name).activation

    return format_of, activation_of


__all__ = ["forecast_foreseen_engine", "forecast_schemes_memory"]
