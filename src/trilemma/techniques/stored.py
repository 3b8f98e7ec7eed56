"""Weights the way they are stored: changed values put back, and rows read without making all of a matrix f32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import RecipeError
from trilemma.formats.pack import PackedMatrix, unpack
from trilemma.formats.panel16 import PANEL_ROWS
from trilemma.formats.plain import to_plain
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.model.plain import PlainDtype, PlainMatrix

_PLAIN: dict[str, PlainDtype] = {"f32": "f32", "f16": "f16", "bf16": "bf16"}


def store_like(model: Model, name: str, values: Float32) -> Float32 | StoredMatrix:
    """`values` in the floating-point format in which `model` keeps tensor `name`; vectors stay f32."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim != 2 or name not in model.config.tensor_shapes():
        return values
    dtype = _PLAIN[model.format_of(name)]
    return values if dtype == "f32" else to_plain(values, dtype)


def has_packed_layers(model: Model) -> bool:
    """Whether a matrix inside a layer is quantized."""
    return any(model.format_of(name) not in _PLAIN for name in model.config.linear_names())


def refuse_packed(model: Model, technique: str, example: str) -> None:
    """Raises RecipeError when a matrix inside a layer is quantized already; `example`: the right order."""
    for name in model.config.linear_names():
        if model.format_of(name) not in _PLAIN:
            raise RecipeError(
                f"'{technique}' changes weights, and '{name}' is stored as {model.format_of(name)} already. "
                f"Start from the unquantized model and quantize afterwards: {example}."
            )


def row_reader(stored: Float32 | StoredMatrix) -> Callable[[NDArray[np.integer] | slice], Float32]:
    """A function from numbers of rows, or a slice of them, to their values (rows, in) f32."""
    if isinstance(stored, PlainMatrix):
        return lambda index: PlainMatrix(stored.dtype, stored.bits[index]).dequantize()
    if isinstance(stored, PackedMatrix):
        codes, count = unpack(stored), np.arange(stored.shape[0])
        return lambda index: codes.rows(count[index]).dequantize()
    values = stored if isinstance(stored, np.ndarray) else stored.dequantize()
    return lambda index: values[index]


def row_parts(shape: tuple[int, ...], values: int) -> list[slice]:
    """Slices of a matrix's rows, whole panels of about so many values, to be joined by `join_rows`."""
    step = max(1, values // (shape[1] * PANEL_ROWS)) * PANEL_ROWS
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
