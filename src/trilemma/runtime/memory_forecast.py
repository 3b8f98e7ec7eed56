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
from trilemma.model.model import Activation, Model
from trilemma.runtime.engine import KvCache
from trilemma.runtime.native_weights import plan_memory

_ROWS = ("f32", "f16")  # held as they come
FormatOf = Callable[[str], str]  # a matrix's name -> its storage format
ActivationOf = Callable[[str], Activation]  # a matrix's name -> the precision of what it is multiplied by


class EngineMemoryForecast(Record):
    """Bytes that an engine of this form will count when it is open, whatever its threads.

    kv_bytes: whole pages of 128 positions (one of fewer where `context` is shorter) for `context` positions of each of
        `sequences`, or for `kv_positions` of all together; reserved at once, resident once written. With the policy
        'none', one layer's keys and values in f32 and the tokens.
    scratch_bytes: activations of a chunk of tokens, inputs in the forms that weights and instruction set ask for,
        partial attention over long contexts, rotary tables, tables of the pages.
    """

    weights_bytes: int
    kv_bytes: int
    scratch_bytes: int
    context: int
    kv_cache: KvCache
    sequences: int = 1
    kv_positions: int | None = None

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.scratch_bytes


def forecast_engine(
    model: Model,
    *,
    context: int,
    kv: KvCache | None = None,
    sequences: int = 1,
    kv_positions: int | None = None,
    isa: str | None = None,
) -> EngineMemoryForecast:
    """`forecast_engine_of` a model in its own form; `kv` is its own policy by default."""
    return forecast_engine_of(
        model.config, model.format_of, lambda name: model.linear(name).activation,
        context=context, kv=kv or model.run.kv_cache, sequences=sequences, kv_positions=kv_positions, isa=isa,
    )  # fmt: skip


def forecast_engine_of(
    config: DecoderConfig,
    format_of: FormatOf,
    activation_of: ActivationOf,
    *,
    context: int,
    kv: KvCache,
    sequences: int = 1,
    kv_positions: int | None = None,
    isa: str | None = None,
) -> EngineMemoryForecast:
    """What an engine of these shapes and formats would count.

    Args:
        format_of, activation_of: of every matrix, as `trilemma.techniques.cost_twin.foresee` tells them of a recipe.
        context: positions that each sequence has room for: prompt and output together.
        kv: cache policy.
        sequences: held at once.
        kv_positions: of all sequences together; `context` of each by default.
        isa: instruction set; the best one here by default.

    Raises:
        InputError: a context that the model does not have, or less than one sequence.
        UnsupportedModelError: shapes that the engine can not run.
    """
    if not 1 <= context <= config.max_context:
        raise InputError(
            f"A context of {context} is not possible: the model's own is {config.max_context}. "
            f"Ask for 1 to {config.max_context} tokens, prompt and output together."
        )
    names = config.product_names()
    products = sorted({(activation_of(name), *_kind(format_of(name))) for name in names})
    cache, scratch = plan_memory(
        config, products, isa=isa, kv_cache=kv, context=context, sequences=sequences, kv_positions=kv_positions
    )
    return EngineMemoryForecast(
        weights_bytes=_weights_bytes(config, format_of), kv_bytes=cache, scratch_bytes=scratch,
        context=context, kv_cache=kv, sequences=sequences, kv_positions=kv_positions,
    )  # fmt: skip


def _weights_bytes(config: DecoderConfig, format_of: FormatOf) -> int:
    """As in the file, but bf16 matrices lie in whole panels of 16 rows and 32 columns."""

    def held(name: str, rows: int, columns: int) -> int:
        if format_of(name) == "bf16":
            return 2 * (-(-rows // 16) * 16) * (-(-columns // 32) * 32)
        return format_bytes(format_of(name), (rows, columns))

    shapes = config.tensor_shapes().items()
    return sum(held(name, shape[0], shape[1]) if len(shape) == 2 else 4 * shape[0] for name, shape in shapes)


def _kind(format_name: str) -> tuple[int, bool, int, bool]:
    """(bits, symmetric, group, codebook) as `plan_memory` takes them."""
    spec = FORMATS.get(format_name)
    return 0 if format_name in _ROWS else spec.bits, spec.symmetric, spec.group or 0, spec.values is not None


__all__ = ["EngineMemoryForecast", "forecast_engine", "forecast_engine_of"]
