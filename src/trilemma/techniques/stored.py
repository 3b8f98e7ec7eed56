"""Putting changed weights back the way they were stored: techniques that change values but choose no format."""

from __future__ import annotations

import numpy as np

from trilemma.core.errors import RecipeError
from trilemma.formats.plain import to_plain
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.model.plain import PlainDtype

_PLAIN: dict[str, PlainDtype] = {"f32": "f32", "f16": "f16", "bf16": "bf16"}


def store_like(model: Model, name: str, values: Float32) -> Float32 | StoredMatrix:
    """`values` in the floating-point format in which `model` keeps tensor `name`; vectors stay f32."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim != 2 or name not in model.config.tensor_shapes():
        return values
    dtype = _PLAIN[model.format_of(name)]
    return values if dtype == "f32" else to_plain(values, dtype)


def refuse_packed(model: Model, technique: str, example: str) -> None:
    """Raises RecipeError when a matrix inside a layer is quantized already; `example`: the right order."""
    for name in model.config.linear_names():
        if model.format_of(name) not in _PLAIN:
            raise RecipeError(
                f"'{technique}' changes weights, and '{name}' is stored as {model.format_of(name)} already. "
                f"Start from the unquantized model and quantize afterwards: {example}."
            )
