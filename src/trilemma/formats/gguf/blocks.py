"""Matrices as GGUF blocks: which type holds a format without loss, and the bytes of its blocks.

GGUF's simple types have one scale for 32 values of a row:

    Q8_0   f16 d, 32 int8                    w = d * q          34 bytes
    Q4_0   f16 d, 16 bytes of two codes      w = d * (q - 8)    18 bytes
    Q4_1   f16 d, f16 m, the same 16 bytes   w = d * q + m      20 bytes
    Q5_0   as Q4_0, 4 bytes of fifth bits    w = d * (q - 16)   22 bytes
    Q5_1   as Q4_1, 4 bytes of fifth bits    w = d * q + m      24 bytes

In the 16 bytes the low nibbles are values 0..15 and the high ones 16..31; fifth bits come before them, in the order
of values. Coarser groups, and one scale a row, lie on the same grids with their scale repeated. Rows must be a
multiple of 32 long. Blocks of 256 values with scales of two levels are `k_blocks`.
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
GgufType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}
_K_TYPES: dict[str, GgufType] = {"int4-g32-k": "Q4_K", "int5-g32-k": "Q5_K", "int6-g16-k": "Q6_K"}
_VALUE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_PLAIN: dict[str, GgufType] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
LOSSLESS_FORMATS = (
    "f32",
    "f16",
    "bf16",
    "int8 in groups of 32n or per row",
    "int4 and int5 in groups of 32n, with or without minima",
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
    if spec.bits == 8 and spec.symmetric:
        return Target("Q8_0")
    if spec.bits == 4:
        return Target("Q4_0" if spec.symmetric else "Q4_1")
    if spec.bits == 5:
        return Target("Q5_0" if spec.symmetric else "Q5_1")
    return None


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
        offset = 2 ** (matrix.spec.bits - 1) if matrix.spec.symmetric else 0
        stored = blocks.view(np.uint8) + np.uint8(offset)
        if matrix.spec.bits == 5:
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
