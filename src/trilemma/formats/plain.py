"""The floating-point formats: f32, f16 and bf16, row by row (layout `rows.v1`), readable by anybody.

The matrix record itself is `model.plain.PlainMatrix`; here are the table entries and the casts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import RecipeError, UnknownNameError
from trilemma.formats.grid import Format
from trilemma.model.plain import PlainDtype, PlainMatrix, f32_to_bf16

F32 = Format(name="f32", bits=32, floating=True, layout="rows.v1")
F16 = Format(name="f16", bits=16, floating=True, layout="rows.v1")
BF16 = Format(name="bf16", bits=16, floating=True, layout="rows.v1")

_F16_MAX = 65504.0


def to_plain(values: NDArray[np.float32], dtype: PlainDtype) -> PlainMatrix:
    """Cast f32 values (out, in) to a floating-point format, rounding to nearest even.

    Raises:
        RecipeError: a value is too large for f16.
        UnknownNameError: not one of f32, f16, bf16.
    """
    if dtype == "f32":
        return PlainMatrix("f32", np.ascontiguousarray(values, dtype=np.float32))
    if dtype == "bf16":
        return PlainMatrix("bf16", f32_to_bf16(values))
    if dtype != "f16":
        raise UnknownNameError("floating-point format", dtype, ("f32", "f16", "bf16"))
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest > _F16_MAX:
        raise RecipeError(f"A weight of {largest:.4g} does not fit f16 (at most {_F16_MAX:.0f}). Use bf16 or f32.")
    return PlainMatrix("f16", values.astype(np.float16))
