"""Layouts `panel16.v1`, `panel16.v2` and `panel16.v3`: quantized codes in panels of 16 rows, 64-byte lines along k.

Rows are padded to a multiple of 16 with zero rows (scale and minimum 0), columns to a multiple of
32 with code 0. With r the row in its panel and j in 0..3:

    4 bits   a line covers k .. k+7; byte r*4 + j = code[k + j] | code[k + 4 + j] << 4;
             symmetric codes are stored biased by 8 (0 is stored as 8), asymmetric as they are
    8 bits   a line covers k .. k+3; byte r*4 + j = code[k + j], two's complement

codes   [panel][line][64] uint8
scales  [panel][group][16] float16; minima likewise (asymmetric only)

`panel16.v2` is the same with codes of 5 and 6 bits and with scales of two levels. The low four bits of 32 columns are
four lines as above, followed by

    5 bits   one line; byte r*4 + j has the fifth bit of columns j, 4 + j, .. 28 + j, the first one lowest;
             symmetric codes are stored biased by 16
    6 bits   two lines of 16 columns each; byte r*4 + j has two bits of columns j, 4 + j, 8 + j, 12 + j;
             symmetric codes are stored biased by 32

scales, minima          of supergroups, float16 as above
sub_scales, sub_minima  [panel][group][16] int8, with 0 for the groups of padding columns

`panel16.v3` is the same with codes of 2 and 3 bits, with codes of a codebook and with groups of 16. Of the 32 columns
of a block, quad i are columns 4i .. 4i + 3, and byte r*4 + j has the codes of column j of its quads:

    2 bits     two lines: quads 0..3 and 4..7, the first one lowest
    3 bits     three lines: quads 0 and 1, 2 and 3, 4 and 5, the first one lowest. Bits 6 and 7 are the two low bits of
               quad 6 in the first line and of quad 7 in the second; in the third, bit 6 is the third bit of quad 6 and
               bit 7 that of quad 7. Symmetric codes are stored biased by 4
    codebook   numbers of its values as 4 bits are, unbiased; 0 in padding

scales, minima          of groups of 16: float16 as above, with 0 for the groups of padding columns
sub_scales              2 bits: the factor of the scale | that of the minimum << 4, both 0..15

Everything here works on blocks of panels, so that a matrix of any size packs without a second copy
of itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trilemma.formats.grid import Format

PANEL_ROWS = 16
COLUMN_STEP = 32
LINE_BYTES = 64
Value = TypeVar("Value", np.float16, np.int8)
_TWOS = np.array([[0], [2], [4], [6]], dtype=np.uint8)
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
    return panels(shape[0]) * PANEL_ROWS * scale_groups(spec, shape[1])


def scale_groups(spec: Format, columns: int) -> int:
    """f16 scales of a row, of groups of padding columns too where a block has several."""
    if spec.supergroup is None and spec.group is not None and COLUMN_STEP % spec.group == 0:
        return padded_columns(columns) // spec.group
    return spec.f16_groups(columns)


def factor_groups(spec: Format, columns: int) -> int:
    """Groups of a row that have a factor of their supergroup's scale, those of padding columns included."""
    return 0 if spec.supergroup is None else padded_columns(columns) // spec.group_size(padded_columns(columns))


def factors_count(spec: Format, shape: tuple[int, int]) -> int:
    """Number of int8 factors of scales (and of minima), padding included."""
    return panels(shape[0]) * PANEL_ROWS * factor_groups(spec, shape[1])


def pack_codes(spec: Format, codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """(out, in) codes -> the flat codes blob."""
    rows, columns = codes.shape
    packed = np.empty(codes_bytes(spec, (rows, columns)), dtype=np.uint8)
    panel_bytes = PANEL_ROWS * padded_columns(columns) * spec.bits // 8
    bias = _bias(spec)
    for first, last in _blocks(rows, columns):
        block = _padded(_numbers(spec, codes[first * PANEL_ROWS : last * PANEL_ROWS]), last - first, bias)
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
        if spec.values is None:
            np.subtract(stored, np.int8(bias), out=target)
        else:
            np.take(np.array(spec.values, dtype=np.int8), stored, out=target)
    return codes


def pack_scales(scales: NDArray[Value], count: int | None = None) -> NDArray[Value]:
    """(out, groups) -> flat [panel][count][16], zero for padding rows and for groups beyond `groups`."""
    rows, groups = scales.shape
    count = groups if count is None else count
    padded = np.zeros((panels(rows) * PANEL_ROWS, count), dtype=scales.dtype)
    padded[:rows, :groups] = scales
    return np.ascontiguousarray(padded.reshape(-1, PANEL_ROWS, count).transpose(0, 2, 1)).reshape(-1)


def unpack_scales(packed: NDArray[Value], shape: tuple[int, int]) -> NDArray[Value]:
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
    return 1 << (spec.bits - 1) if spec.bits < 8 and spec.symmetric and spec.values is None else 0


def _numbers(spec: Format, codes: NDArray[np.int8]) -> NDArray[np.int8]:
    """The codes, or those of a codebook as their numbers in it."""
    if spec.values is None:
        return codes
    numbers = np.searchsorted(spec.legal_codes[:-1], codes).astype(np.int8)
    assert (spec.legal_codes[numbers] == codes).all(), f"codes that are not in the codebook of {spec.name}"
    return numbers


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
    if spec.bits < 4:
        quads = codes.reshape(rows // PANEL_ROWS, PANEL_ROWS, columns // COLUMN_STEP, 8, 4)
        low = _pack_2(quads) if spec.bits == 2 else _pack_3(quads)  # (panel, row, block, line, 4)
        return np.ascontiguousarray(low.transpose(0, 2, 3, 1, 4))
    lines = (codes & np.uint8(15)).reshape(rows // PANEL_ROWS, PANEL_ROWS, columns // 8, 2, 4)
    nibbles = lines[:, :, :, 0] | (lines[:, :, :, 1] << np.uint8(4))  # (panel, row, line, 4)
    if spec.bits == 4:
        return np.ascontiguousarray(nibbles.transpose(0, 2, 1, 3))
    more, count = spec.bits - 4, 8 // (spec.bits - 4)  # further bits of a code, codes of a byte of them
    high = (codes >> np.uint8(4)).reshape(rows // PANEL_ROWS, PANEL_ROWS, -1, count, 4)
    shifted = high << (np.arange(count, dtype=np.uint8) * np.uint8(more))[:, None]
    planes = np.bitwise_or.reduce(shifted, axis=3)  # (panel, row, line, 4)
    blocks = (rows // PANEL_ROWS, PANEL_ROWS, columns // COLUMN_STEP, -1, 4)
    whole = np.concatenate((nibbles.reshape(blocks), planes.reshape(blocks)), axis=3)
    return np.ascontiguousarray(whole.transpose(0, 2, 3, 1, 4))


def _unpack_block(spec: Format, packed: NDArray[np.uint8], panel_count: int) -> NDArray[np.uint8]:
    lines = packed.reshape(panel_count, -1, PANEL_ROWS, 4).transpose(0, 2, 1, 3)  # (panel, row, line, 4)
    rows = panel_count * PANEL_ROWS
    if spec.bits == 8:
        return np.ascontiguousarray(lines).reshape(rows, -1)
    if spec.bits < 4:
        blocks = lines.reshape(panel_count, PANEL_ROWS, -1, spec.bits, 4)
        return (_unpack_2(blocks) if spec.bits == 2 else _unpack_3(blocks)).reshape(rows, -1)
    more = spec.bits - 4
    blocks = lines.reshape(panel_count, PANEL_ROWS, -1, 4 + more, 4)
    nibbles = blocks[:, :, :, :4]
    low = np.stack((nibbles & np.uint8(15), nibbles >> np.uint8(4)), axis=4).reshape(rows, -1)
    if not more:
        return low
    shifts = (np.arange(8 // more, dtype=np.uint8) * np.uint8(more))[:, None]
    high = (blocks[:, :, :, 4:, None, :] >> shifts) & np.uint8((1 << more) - 1)
    both: NDArray[np.uint8] = low | (high.reshape(rows, -1) << np.uint8(4))
    return both


def _pack_2(quads: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(panel, row, block, 8, 4) codes -> (panel, row, block, 2, 4) bytes."""
    fours = quads.reshape(*quads.shape[:3], 2, 4, 4)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(fours << _TWOS, axis=4)
    return packed


def _unpack_2(lines: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(panel, row, block, 2, 4) bytes -> (panel, row, block, 2, 4, 4) codes."""
    found: NDArray[np.uint8] = lines[:, :, :, :, None, :] >> _TWOS & np.uint8(3)
    return found


def _pack_3(quads: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(panel, row, block, 8, 4) codes -> (panel, row, block, 3, 4) bytes."""
    two, three, six = np.uint8(2), np.uint8(3), np.uint8(6)
    packed: NDArray[np.uint8] = quads[:, :, :, 0:6:2] | quads[:, :, :, 1:6:2] << three
    packed[:, :, :, :2] |= quads[:, :, :, 6:] << six
    packed[:, :, :, 2] |= (quads[:, :, :, 6] >> two) << six | (quads[:, :, :, 7] >> two) << np.uint8(7)
    return packed


def _unpack_3(lines: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(panel, row, block, 3, 4) bytes -> (panel, row, block, 8, 4) codes."""
    seven, three, four = np.uint8(7), np.uint8(3), np.uint8(4)
    quads = np.empty((*lines.shape[:3], 8, 4), dtype=np.uint8)
    quads[:, :, :, 0:6:2], quads[:, :, :, 1:6:2] = lines & seven, lines >> three & seven
    quads[:, :, :, 6:] = lines[:, :, :, :2] >> np.uint8(6)
    quads[:, :, :, 6] |= lines[:, :, :, 2] >> four & four
    quads[:, :, :, 7] |= lines[:, :, :, 2] >> np.uint8(5) & four
    return quads
