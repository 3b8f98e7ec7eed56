"""Matrices as GGUF blocks: which type holds a format without loss, and the bytes of its blocks.

GGUF's simple types have one scale for 32 values of a row:

    Q8_0   f16 d, 32 int8                    w = d * q          34 bytes
    Q4_0   f16 d, 16 bytes of two codes      w = d * (q - 8)    18 bytes
    Q4_1   f16 d, f16 m, the same 16 bytes   w = d * q + m      20 bytes
    Q5_0   as Q4_0, 4 bytes of fifth bits    w = d * (q - 16)   22 bytes
    Q5_1   as Q4_1, 4 bytes of fifth bits    w = d * q + m      24 bytes
    IQ4_NL as Q4_0                           w = d * values[q]  18 bytes

In the 16 bytes the low nibbles are values 0..15 and the high ones 16..31; fifth bits come before them, in the order
of values. Coarser groups, and one scale a row, lie on the same grids with their scale repeated. Codes of 2, 3 and 6
bits go out in the next wider type. Rows must be a multiple of 32 long. Blocks of 256 values with scales of two levels
are `k_blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trilemma.formats.gguf.k_blocks import K_BYTES, SUPERBLOCK, encode_k_blocks
from trilemma.formats.grid import Format, QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, unpack
from trilemma.formats.quantize import quantize_rtn
from trilemma.model.model import Float32, StoredMatrix
from trilemma.model.plain import PlainMatrix, f32_to_bf16

BLOCK = 32
GgufType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"
]
_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "IQ4_NL": 18}
_K_TYPES: dict[str, GgufType] = {
    "int2-g16-k": "Q2_K", "int3-g16-k": "Q3_K", "int4-g32-k": "Q4_K", "int5-g32-k": "Q5_K", "int6-g16-k": "Q6_K",
}  # fmt: skip
_VALUE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_PLAIN: dict[str, GgufType] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
LOSSLESS_FORMATS = (
    "f32",
    "f16",
    "bf16",
    "int8 in groups of 32n or per row",
    "int2 to int6 in groups of 32n, with or without minima",
    "nl4",
    "the formats that end in -k",
)


@dataclass(frozen=True)
class Target:
    """The GGUF type of one matrix; `exact` when values stay the same, `why` when it is not the obvious type."""

    type: GgufType
    exact: bool = True
    why: str = ""


def target_of(spec: Format, columns: int) -> Target | None:
    """The type that holds a format without loss, or None where there is none."""
    if spec.floating:
        return Target(_PLAIN[spec.name]) if spec.name in _PLAIN else None
    if columns % BLOCK:
        return Target("F32", why=f"rows of {columns} are no multiple of {BLOCK}, so values go out as F32")
    if spec.supergroup is not None:
        if columns % SUPERBLOCK:
            return Target("F32", why=f"rows of {columns} are no multiple of {SUPERBLOCK}, so values go out as F32")
        return Target(_K_TYPES[spec.name]) if spec.name in _K_TYPES else None
    if spec.group_size(columns) % BLOCK:
        return None
    if spec.values is not None:
        return Target("IQ4_NL") if spec.name == "nl4-g32" else None
    if spec.symmetric:
        types: dict[int, GgufType] = {8: "Q8_0", 6: "Q8_0", 5: "Q5_0", 4: "Q4_0", 3: "Q4_0"}
    else:
        types = {5: "Q5_1", 4: "Q4_1", 3: "Q4_1", 2: "Q4_1"}
    return Target(types[spec.bits], why=_wider(spec.bits, types[spec.bits])) if spec.bits in types else None


def _wider(bits: int, kind: GgufType) -> str:
    if bits in (4, 5, 8):
        return ""
    return f"{bits}-bit codes go out as {kind}, which holds them without loss: GGUF has no such type of {bits} bits"


def nearest_target(columns: int) -> Target:
    """The type for requantizing what has no type of its own."""
    return Target("F16" if columns % BLOCK else "Q8_0", exact=False)


def row_bytes(kind: GgufType, columns: int) -> int:
    if kind in K_BYTES:
        return columns // SUPERBLOCK * K_BYTES[kind]
    return columns * _VALUE_BYTES[kind] if kind in _VALUE_BYTES else columns // BLOCK * _BLOCK_BYTES[kind]


def encode_matrix(stored: Float32 | StoredMatrix, target: Target, rows: NDArray[np.intp] | None) -> NDArray[Any]:
    """The matrix as GGUF keeps it: (out, row bytes) uint8, or (out, in) f32 / f16.

    Args:
        rows: order in which the rows go out (GGUF's q and k), or None.
    """
    if isinstance(stored, PlainMatrix) and target.type == "BF16" and stored.format == "bf16":
        return _bytes(_reordered(stored.bits, rows))
    if isinstance(stored, PackedMatrix | QuantizedMatrix) and target.exact and target.type not in _VALUE_BYTES:
        matrix = unpack(stored) if isinstance(stored, PackedMatrix) else stored
        if target.type in K_BYTES:
            return encode_k_blocks(matrix if rows is None else matrix.rows(rows), target.type)
        return encode_blocks(matrix, target.type, rows)
    values = _reordered(stored if isinstance(stored, np.ndarray) else stored.dequantize(), rows)
    if target.type == "Q8_0":
        return encode_blocks(quantize_rtn(values, _Q8), "Q8_0", None)
    if target.type == "BF16":
        return _bytes(f32_to_bf16(values))
    return values.astype(np.float16 if target.type == "F16" else np.float32)


def encode_blocks(matrix: QuantizedMatrix, kind: GgufType, rows: NDArray[np.intp] | None) -> NDArray[np.uint8]:
    """(out, row bytes) uint8 of a quantized matrix whose groups are multiples of 32."""
    codes = _reordered(matrix.codes, rows)
    count, columns = codes.shape
    blocks = codes.reshape(count, columns // BLOCK, BLOCK)
    parts = [_per_block(_reordered(matrix.scales, rows), matrix.spec, columns)]
    if matrix.minima is not None:
        parts.append(_per_block(_reordered(matrix.minima, rows), matrix.spec, columns))
    if kind == "Q8_0":
        parts.append(blocks.view(np.uint8))
    else:
        stored = blocks.view(np.uint8) + np.uint8({"Q4_0": 8, "Q5_0": 16}.get(kind, 0))
        if kind == "IQ4_NL":
            stored = np.searchsorted(matrix.spec.legal_codes, blocks).astype(np.uint8)
        if kind in ("Q5_0", "Q5_1"):
            parts.append(np.packbits(stored >> np.uint8(4), axis=2, bitorder="little"))
        parts.append((stored[:, :, :16] & np.uint8(15)) | (stored[:, :, 16:] << np.uint8(4)))
    return np.concatenate(parts, axis=2).reshape(count, -1)


def rope_rows(heads: int, head_dim: int) -> NDArray[np.intp]:
    """Row order that turns rotate-half into the adjacent pairs of GGUF's llama: row 2i is i, row 2i+1 is i + half."""
    half = head_dim // 2
    within = np.stack((np.arange(half), np.arange(half) + half), axis=1).reshape(-1)
    return (np.arange(heads)[:, None] * head_dim + within).reshape(-1).astype(np.intp)


_Q8 = Format(name="int8-g32", bits=8, group=BLOCK)


def _per_block(values: NDArray[np.float16], spec: Format, columns: int) -> NDArray[np.uint8]:
    """(out, groups) f16 -> (out, blocks, 2) bytes, a group's value repeated for each of its blocks."""
    of_block = np.arange(columns // BLOCK) * BLOCK // spec.group_size(columns)
    repeated = np.ascontiguousarray(values[:, of_block])
    return repeated.view(np.uint8).reshape(*repeated.shape, 2)


def _reordered(values: NDArray[Any], rows: NDArray[np.intp] | None) -> NDArray[Any]:
    return np.ascontiguousarray(values if rows is None else values[rows])


def _bytes(bits: NDArray[np.uint16]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(bits).view(np.uint8)
