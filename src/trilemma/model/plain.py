"""Unquantized matrices kept in the bits they were stored in: f32, f16 or bf16, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

PlainDtype = Literal["f32", "f16", "bf16"]


@dataclass(frozen=True, eq=False)
class PlainMatrix:
    """`bits` is (out, in): float32 for f32, float16 for f16, uint16 (the raw bits) for bf16."""

    dtype: PlainDtype
    bits: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]

    @property
    def format(self) -> str:
        return self.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return (self.bits.shape[0], self.bits.shape[1])

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes

    def dequantize(self) -> NDArray[np.float32]:
        if self.dtype == "bf16":
            return bf16_to_f32(self.bits)  # type: ignore[arg-type]
        return self.bits.astype(np.float32)


def bf16_to_f32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest even; NaN stays NaN."""
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
