"""Weights into the native engine, a tensor at a time, so that they are never twice in memory.

Embedding and head go first: while the largest tensors are read, little else is held yet. What they were read into is
given back to the system on the way, which glibc's allocator would not do by itself. What cache and scratch would take
beside them can be asked without loading anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError, EngineError, UnsupportedModelError
from trilemma.formats.grid import QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, pack
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Model
from trilemma.model.plain import PlainMatrix

try:
    from trilemma import _native as _native
except ImportError as error:  # pragma: no cover - only where the build was skipped
    raise EngineError(
        f"The native engine is not built ({error}). Build it with 'make native' or 'pip install .', "
        "or choose the torch engine."
    ) from None

_LAYOUTS = ("panel16.v1", "panel16.v2")
_RELEASE_EVERY = 8_000_000  # bytes read


def load_weights(model: Model) -> _native.Model:
    """Copy a model's tensors into the engine one at a time, so that they are never twice in memory."""
    try:
        weights = _native.Model(model.config.model_dump())
    except _native.NativeError as fault:
        raise UnsupportedModelError(str(fault)) from None
    since = 0
    for name in loading_order(model.config):
        try:
            since += _add(weights, name, model)
        except _native.NativeError as fault:
            raise CheckpointError(str(fault)) from None
        if since > _RELEASE_EVERY:
            since = 0
            _native.release_free_memory()
    weights.finalize()
    _native.release_free_memory()
    return weights


def plan_memory(
    config: DecoderConfig,
    products: Sequence[tuple[str, int, bool]],
    *,
    isa: str | None = None,
    kv_cache: str,
    context: int,
    sequences: int = 1,
    kv_positions: int | None = None,
) -> tuple[int, int]:
    """Bytes of KV cache and scratch that an engine over `config` would hold; nothing is allocated.

    Args:
        products: (activation, bits, symmetric) of the matrices that are multiplied, each combination once; bits are 0
            for f32 and f16, which are held in rows, and 16 for bf16.
        isa: instruction set; the best one here by default.

    Raises:
        UnsupportedModelError: a config or an option that the engine can not run.
    """
    try:
        return _native.plan_memory(
            config.model_dump(),
            products,
            isa=isa or "",
            kv_cache=kv_cache,
            max_context=context,
            max_sequences=sequences,
            kv_positions=kv_positions or 0,
        )
    except _native.NativeError as fault:
        raise UnsupportedModelError(str(fault)) from None


def loading_order(config: DecoderConfig) -> list[str]:
    """All tensors, embedding and head before the layers: while the largest are read, little else is held yet."""
    return sorted(config.tensor_shapes(), key=lambda name: name.startswith("layers."))


def _add(weights: _native.Model, name: str, model: Model) -> int:
    """Hands one tensor over; returns how many bytes it was read into."""
    stored = model.stored(name)
    activation = model.linear(name).activation
    if isinstance(stored, QuantizedMatrix):
        stored = pack(stored)
    if isinstance(stored, PackedMatrix):
        _add_packed(weights, name, stored, activation)
    elif isinstance(stored, PlainMatrix):
        rows, cols = stored.shape
        weights.add_plain(name, stored.dtype, rows, cols, _bytes(stored.bits), activation)
    elif isinstance(stored, np.ndarray):
        values = np.ascontiguousarray(stored, dtype=np.float32)
        if values.ndim == 1:
            weights.add_vector(name, values)
        elif values.ndim == 2:
            weights.add_plain(name, "f32", len(values), values.shape[1], _bytes(values), activation)
        else:
            raise CheckpointError(f"Tensor '{name}' has shape {values.shape}; a vector or a matrix was expected.")
    else:
        raise UnsupportedModelError(f"Tensor '{name}' is stored as '{stored.format}', which the engine can not run.")
    return stored.nbytes


def _add_packed(weights: _native.Model, name: str, stored: PackedMatrix, activation: str) -> None:
    spec = stored.spec
    if spec.layout not in _LAYOUTS:
        raise UnsupportedModelError(
            f"Tensor '{name}' has the layout '{spec.layout}'; the engine runs {' and '.join(_LAYOUTS)}."
        )
    group = (spec.group or 0) if spec.supergroup is None else spec.supergroup
    sub_group = 0 if spec.supergroup is None else spec.group or 0
    parts = {part: _bytes(values) for part, values in stored.parts().items()}
    weights.add_packed(
        name, spec.bits, spec.symmetric, group, *stored.shape, activation, parts["codes"], parts["scales"],
        parts.get("minima"), sub_group, parts.get("sub_scales"), parts.get("sub_minima"),
    )  # fmt: skip


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
