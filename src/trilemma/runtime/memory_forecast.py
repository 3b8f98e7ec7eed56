"""What the native engine will hold, before anything is opened: weights, KV cache and scratch, to the byte.

The sizes of cache and scratch are asked of the engine itself (`_native.plan_memory`, which allocates nothing and is
what an opened engine allocates by); those of packed weights are the formats', which the engine checks when it loads.
No weight is read. What a whole process adds is told by `trilemma.measure.memory.forecast`.
"""

from __future__ import annotations

from collections.abc import Callable

from trilemma.core.errors import InputError
from trilemma.core.record import Record
from trilemma.formats import FORMATS
from trilemma.formats.pack import format_bytes
from trilemma.model.config import DecoderConfig
from trilemma.model.cost import weights_bytes
from trilemma.model.model import Activation, Model
from trilemma.runtime.engine import KvCache
from trilemma.runtime.native_weights import plan_memory

FormatOf = Callable[[str], str]  # a matrix's name -> its storage format
ActivationOf = Callable[[str], Activation]  # a matrix's name -> the precision of what it is multiplied by


class EngineMemoryForecast(Record):
    """Bytes that an engine of this form will count when it is open. Threads and instruction set change none of them.

    kv_bytes: whole blocks of 16 positions for `context` positions of each of `sequences`, reserved in full; with the
        policy 'none', one layer's keys and values in f32 and the tokens.
    scratch_bytes: activations of a chunk of tokens, inputs in the forms that the weights ask for, rotary tables.
    """

    weights_bytes: int
    kv_bytes: int
    scratch_bytes: int
    context: int
    kv_cache: KvCache
    sequences: int = 1

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.scratch_bytes


def forecast_engine(
    model: Model, *, context: int, kv: KvCache | None = None, sequences: int = 1
) -> EngineMemoryForecast:
    """`forecast_engine_of` a model in its own form; `kv` is its own policy by default."""
    return forecast_engine_of(
        model.config, model.format_of, lambda name: model.linear(name).activation,
        context=context, kv=kv or model.run.kv_cache, sequences=sequences,
    )  # fmt: skip


def forecast_engine_of(
    config: DecoderConfig,
    format_of: FormatOf,
    activation_of: ActivationOf,
    *,
    context: int,
    kv: KvCache,
    sequences: int = 1,
) -> EngineMemoryForecast:
    """What an engine of these shapes and formats would count.

    Args:
        format_of, activation_of: of every matrix, as `trilemma.techniques.cost_twin.foresee` tells them of a recipe.
        context: positions that each sequence has room for: prompt and output together.
        kv: cache policy.
        sequences: held at once.

    Raises:
        InputError: a context that the model does not have, or less than one sequence.
        UnsupportedModelError: shapes that the engine can not run.
    """
    if not 1 <= context <= config.max_context:
        raise InputError(
            f"A context of {context} is not possible: the model's own is {config.max_context}. "
            f"Ask for 1 to {config.max_context} tokens, prompt and output together."
        )
    products = sorted({(activation_of(name), _asymmetric(format_of(name))) for name in config.product_names()})
    cache, scratch = plan_memory(config, products, kv_cache=kv, context=context, sequences=sequences)
    return EngineMemoryForecast(
        weights_bytes=weights_bytes(config, format_of, format_bytes), kv_bytes=cache, scratch_bytes=scratch,
        context=context, kv_cache=kv, sequences=sequences,
    )  # fmt: skip


def _asymmetric(format_name: str) -> bool:
    spec = FORMATS.get(format_name)
    return not spec.floating and not spec.symmetric


__all__ = ["EngineMemoryForecast", "forecast_engine", "forecast_engine_of"]
