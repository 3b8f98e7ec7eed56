"""Weights into the native engine, so that they are never twice in memory.

Matrices that lie in files are read there by the engine itself, on all its threads and in the order of the file, or
used where they lie in a map of it. The others go over a tensor at a time, embedding and head first: while the largest
are read, little else is held yet. What they were read into is given back to the system on the way, which glibc's
allocator would not do by itself. What cache and scratch would take beside them can be asked without loading anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError, EngineError, UnsupportedModelError
from trilemma.formats import FORMATS
from trilemma.formats.grid import Format, QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, pack
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Model
from trilemma.model.plain import PlainMatrix
from trilemma.runtime.engine import LoadMode

try:
    from trilemma import _native as _native
except ImportError as error:  # pragma: no cover - only where the build was skipped
    raise EngineError(
        f"The native engine is not built ({error}). Build it with 'make native' or 'pip install .', "
        "or choose the torch engine."
    ) from None

_LAYOUTS = ("panel16.v1", "panel16.v2", "panel16.v3")
_RELEASE_EVERY = 8_000_000  # bytes read


def load_weights(
    model: Model, *, threads: int = 1, load: LoadMode = "copy", verify: bool | None = None
) -> _native.Model:
    """A model's tensors in the engine; `load` and `verify` as in EngineOptions.

    Raises:
        CheckpointError: a file that is cut or was changed, a tensor of the wrong shape, or values that are not finite.
        UnsupportedModelError: a storage format that the engine can not run.
    """
    try:
        weights = _native.Model(model.config.model_dump())
    except _native.NativeError as fault:
        raise UnsupportedModelError(str(fault)) from None
    loader = _FileLoader(weights, load == "map", load == "copy" if verify is None else verify)
    try:
        _add_one_by_one(
            weights, model, [name for name in loading_order(model.config) if not loader.announce(model, name)]
        )
        loader.run(threads)
        weights.finalize()
    except _native.NativeError as fault:
        raise CheckpointError(str(fault)) from None
    except MemoryError:
        raise EngineError(
            "There is not enough memory for the model's weights. Choose a smaller format, or open with load='map'."
        ) from None
    _native.release_free_memory()
    return weights


class _FileLoader:
    """Announces matrices that lie in files to the engine, which then reads them together."""

    def __init__(self, weights: _native.Model, mapped: bool, verify: bool) -> None:
        self._loader = _native.Loader(weights, map=mapped, verify=verify)
        self._files: dict[Path, int] = {}

    def announce(self, model: Model, name: str) -> bool:
        """Whether the engine will read this tensor by itself."""
        found = model.locate(name)
        if found is None:
            return False
        expected = model.config.tensor_shapes()[name]
        if found.shape != expected:
            raise CheckpointError(f"Tensor '{name}' has shape {found.shape}; the config says {expected}.")
        if found.file not in self._files:
            self._files[found.file] = self._loader.add_file(str(found.file), found.file_bytes)
        activation, file = model.linear(name).activation, self._files[found.file]
        pieces = [(p.offset, p.nbytes, -1 if p.crc32 is None else p.crc32) for p in found.pieces.values()]
        if found.encoding == "panels":
            spec = FORMATS.get(found.format)
            self._loader.add_panels(
                name,
                spec.bits,
                spec.symmetric,
                *_groups(spec),
                *found.shape,
                activation,
                file,
                pieces,
                codebook=spec.values is not None,
            )
            return True
        order = [] if found.order is None else found.order.tolist()
        if found.encoding == "rows":
            self._loader.add_rows(name, found.label, found.format, *found.shape, activation, file, pieces[0], order)
        else:
            self._loader.add_blocks(name, found.label, found.encoding, *found.shape, activation, file, pieces[0], order)
        return True

    def run(self, threads: int) -> None:
        self._loader.run(threads)


def _add_one_by_one(weights: _native.Model, model: Model, names: Sequence[str]) -> None:
    since = 0
    for name in names:
        since += _add(weights, name, model)
        if since > _RELEASE_EVERY:
            since = 0
            _native.release_free_memory()


def plan_memory(
    config: DecoderConfig,
    products: Sequence[tuple[str, int, bool, int, bool]],
    *,
    isa: str | None = None,
    kv_cache: str,
    context: int,
    sequences: int = 1,
    kv_positions: int | None = None,
) -> tuple[int, int]:
    """Bytes of KV cache and scratch that an engine over `config` would hold; nothing is allocated.

    Args:
        products: (activation, bits, symmetric, group, codebook) of the matrices that are multiplied, each combination
            once; bits are 0 for f32 and f16, which are held in rows, and 16 for bf16. The group is the smallest that
            has a scale or a factor, 0 for a row.
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
            f"Tensor '{name}' has the layout '{spec.layout}'; the engine runs {', '.join(_LAYOUTS)}."
        )
    group, sub_group = _groups(spec)
    parts = {part: _bytes(values) for part, values in stored.parts().items()}
    weights.add_packed(
        name, spec.bits, spec.symmetric, group, *stored.shape, activation, parts["codes"], parts["scales"],
        parts.get("minima"), sub_group, parts.get("sub_scales"), parts.get("sub_minima"),
        codebook=spec.values is not None,
    )  # fmt: skip


def _groups(spec: Format) -> tuple[int, int]:
    """Columns that share an f16 scale, and those that share a factor of it; 0 for the whole row, and for none."""
    return (spec.group or 0, 0) if spec.supergroup is None else (spec.supergroup, spec.group or 0)


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
