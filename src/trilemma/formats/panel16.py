"""Layout `panel16.v1`: quantized codes in panels of 16 rows, one 64-byte line a step of k.

Rows are padded to a multiple of 16 with zero rows (scale and minimum 0), columns to a multiple of
32 with code 0. With r the row in its panel and j in 0..3:

    4 bits   a line covers k .. k+7; byte r*4 + j = code[k + j] | code[k + 4 + j] << 4;
             symmetric codes are stored biased by 8 (0 is stored as 8), asymmetric as they are
    8 bits   a line covers k .. k+3; byte r*4 + j = code[k + j], two's complement

codes   [panel][line][64] uint8
scales  [panel][group][16] float16; minima likewise (asymmetric only)

Everything here works on blocks of panels, so that a matrix of any size packs without a second copy
of itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from trilemma.formats.grid import Format

NAME = "panel16.v1"
PANEL_ROWS = 16
COLUMN_STEP = 32
LINE_BYTES = 64
SYMMETRIC_BIAS = 8  # of stored 4-bit codes
_BLOCK_CODES = 1 << 21  # codes handled at a time: fits a second-level cache well enough


def panels(rows: int) -> int:
    return -(-rows // PANEL_ROWS)


def padded_columns(columns: int) -> int:
    return -(-columns // COLUMN_STEP) * COLUMN_STEP


def codes_bytes(spec: Format, shape: tuple[int, int]) -> int:
    """Bytes of the codes blob, padding included."""
    return panels(shape[0]) * PANEL_ROWS * padded_columns(shape[1]) * spec.bits // 8


def scales_count(spec: Format, shape: tuple[int, int]) -> int:
    """Number of f16 scales (and of minima), padding rows included."""
    return panels(shape[0]) * PANEL_ROWS * spec.groups(shape[1])


def pack_codes(spec: Format, codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """(out, in) codes -> the flat codes blob."""
    rows, columns = codes.shape
    packed = np.empty(codes_bytes(spec, (rows, columns)), dtype=np.uint8)
    panel_bytes = PANEL_ROWS * padded_columns(columns) * spec.bits // 8
    bias = _bias(spec)
    for first, last in _blocks(rows, columns):
        block = _padded(codes[first * PANEL_ROWS : last * PANEL_ROWS], last - first, bias)
        packed[first * panel_bytes : last * panel_bytes] = _pack_block(spec, block).reshape(-1)
    return packed


def unpack_codes(spec: Format, packed: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.int8]:
    """The flat codes blob -> (out, in) codes."""
    rows, columns = shape
    codes = np.empty(shape, dtype=np.int8)
    panel_bytes = PANEL_ROWS * padded_columns(columns) * spec.bits // 8
    bias = _bias(spec)
    for first, last in _blocks(rows, columns):
        block = _unpack_block(spec, packed[first * panel_bytes : last * panel_bytes], last - first)
        target = codes[first * PANEL_ROWS : last * PANEL_ROWS]
        stored = block[: target.shape[0], :columns].view(np.int8)
        np.subtract(stored, np.int8(bias), out=target)
    return codes


def pack_scales(scales: NDArray[np.float16]) -> NDArray[np.float16]:
    """(out, groups) -> flat [panel][group][16], zero for padding rows."""
    rows, groups = scales.shape
    padded = np.zeros((panels(rows) * PANEL_ROWS, groups), dtype=np.float16)
    padded[:rows] = scales
    return np.ascontiguousarray(padded.reshape(-1, PANEL_ROWS, groups).transpose(0, 2, 1)).reshape(-1)


def unpack_scales(packed: NDArray[np.float16], shape: tuple[int, int]) -> NDArray[np.float16]:
    """Flat [panel][group][16] -> (out, groups); `shape` is (out, groups)."""
    rows, groups = shape
    return np.ascontiguousarray(packed.reshape(-1, groups, PANEL_ROWS).transpose(0, 2, 1).reshape(-1, groups)[:rows])


def random_codes(spec: Format, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A codes blob of uniform random codes with the right padding, made without unpacked codes."""
    rows, columns = shape
    packed = np.frombuffer(bytearray(rng.bytes(codes_bytes(spec, shape))), dtype=np.uint8)
    if spec.bits == 8:
        packed[packed == 0x80] = 0x81  # -128 is legal but never made by our quantizers
    if rows % PANEL_ROWS or columns % COLUMN_STEP:
        return pack_codes(spec, unpack_codes(spec, packed, shape))
    return packed


def _bias(spec: Format) -> int:
    return SYMMETRIC_BIAS if spec.bits == 4 and spec.symmetric else 0


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_CODES // (PANEL_ROWS * padded_columns(columns)))
    total = panels(rows)
    for first in range(0, total, step):
        yield first, min(first + step, total)


def _padded(codes: NDArray[np.int8], panel_count: int, bias: int) -> NDArray[np.uint8]:
    padded = np.full((panel_count * PANEL_ROWS, padded_columns(codes.shape[1])), bias, dtype=np.uint8)
    padded[: codes.shape[0], : codes.shape[1]] = codes.view(np.uint8)
    padded[: codes.shape[0], : codes.shape[1]] += np.uint8(bias)
    return padded


def _pack_block(spec: Format, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, columns = codes.shape
    if spec.bits == 8:
        lines = codes.reshape(rows // PANEL_ROWS, PANEL_ROWS, columns // 4, 4)
        return np.ascontiguousarray(lines.transpose(0, 2, 1, 3))
    lines = codes.reshape(rows // PANEL_ROWS, PANEL_ROWS, columns // 8, 2, 4)
    nibbles = lines[:, :, :, 0] | (lines[:, :, :, 1] << np.uint8(4))  # (panel, row, line, 4)
    return np.ascontiguousarray(nibbles.transpose(0, 2, 1, 3))


def _unpack_block(spec: Format, packed: NDArray[np.uint8], panel_count: int) -> NDArray[np.uint8]:
    lines = packed.reshape(panel_count, -1, PANEL_ROWS, 4).transpose(0, 2, 1, 3)  # (panel, row, line, 4)
    if spec.bits == 8:
        return np.ascontiguousarray(lines).reshape(panel_count * PANEL_ROWS, -1)
    pair = np.stack((lines & np.uint8(15), lines >> np.uint8(4)), axis=3)  # (panel, row, line, 2, 4)
    return pair.reshape(panel_count * PANEL_ROWS, -1)
