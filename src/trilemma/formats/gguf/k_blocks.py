"""GGUF's K-quants, blocks of 256 values whose scales have two levels, from and to grids here without loss.

    Q2_K   16 bytes of factors s, t << 4, 64 of codes, f16 d, f16 m               w = d * s * q - m * t     84 bytes
    Q3_K   32 bytes of third bits, 64 of pairs of bits, 12 of factors s, f16 d    w = d * s * (q - 4)      110 bytes
    Q4_K   f16 d, f16 m, 12 bytes of factors s and t of 8 groups, 128 of codes    w = d * s * q - m * t    144 bytes
    Q5_K   f16 d, f16 m, the same 12 bytes, 32 of fifth bits, 128 of codes        the same                 176 bytes
    Q6_K   128 bytes of nibbles, 64 of pairs of bits, 16 signed factors s, f16 d  w = d * s * (q - 32)     210 bytes

The factors of Q4_K and Q5_K have six bits: those of groups 0-3 are whole in bytes 0-3 (scales) and 4-7 (minima), whose
two upper bits belong to groups 4-7; bytes 8-11 have the nibbles of those. Codes lie in pairs of groups of 32 a nibble
each, the first group low; byte i of the fifth bits has those of value i of each group, the first group lowest. Each
half of a Q6_K block has 64 bytes of nibbles, whose low ones are its first 64 values, and 32 bytes of pairs of bits of
its four groups of 32, the first lowest. So are the pairs of Q2_K and Q3_K. Byte i of the third bits has those of
value i of each of the eight groups of 32, the first lowest. The sixteen factors of Q3_K have six bits, biased by 32:
nibbles in bytes 0-7, the first eight factors low, and in byte 8 + i the two bits above of i, i + 4, i + 8 and i + 12.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trilemma.formats import FORMATS
from trilemma.formats.grid import QuantizedMatrix

SUPERBLOCK = 256  # values of a block
K_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
Bytes = NDArray[np.uint8]
_SIX, _FOUR, _TWO = np.uint8(63), np.uint8(15), np.uint8(3)
_NIBBLES = np.array([[0], [4]], dtype=np.uint8)
_PAIRS = np.array([[0], [2], [4], [6]], dtype=np.uint8)
_BITS = np.arange(8, dtype=np.uint8)[:, None]


def decode_q2_k(raw: Bytes, shape: tuple[int, int]) -> QuantizedMatrix:
    """A matrix (out, in) from its bytes."""
    blocks = _blocks(raw, shape, "Q2_K")
    factors, codes = blocks[:, :, :16], _group_pairs(blocks[:, :, 16:80]).reshape(shape)
    scales, minima = (part.view(np.int8).reshape(shape[0], -1) for part in (factors & _FOUR, factors >> np.uint8(4)))
    d, m = _f16_at(blocks, 80), -_f16_at(blocks, 82)
    return QuantizedMatrix(FORMATS.get("int2-g16-k"), codes.view(np.int8), d, m, scales, minima)


def decode_q3_k(raw: Bytes, shape: tuple[int, int]) -> QuantizedMatrix:
    """A matrix (out, in) from its bytes."""
    blocks = _blocks(raw, shape, "Q3_K")
    third = (blocks[:, :, None, :32] >> _BITS & np.uint8(1)) << np.uint8(2)
    codes = (_group_pairs(blocks[:, :, 32:96]).reshape(third.shape) | third).view(np.int8) - np.int8(4)
    low, high = blocks[:, :, None, 96:104] >> _NIBBLES & _FOUR, blocks[:, :, None, 104:108] >> _PAIRS & _TWO
    place = (*blocks.shape[:2], 16)
    factors = (low.reshape(place) | high.reshape(place) << np.uint8(4)).view(np.int8) - np.int8(32)
    scales, d = factors.reshape(shape[0], -1), _f16_at(blocks, 108)
    return QuantizedMatrix(FORMATS.get("int3-g16-k"), codes.reshape(shape), d, None, scales)


def decode_q4_k(raw: Bytes, shape: tuple[int, int]) -> QuantizedMatrix:
    """A matrix (out, in) from its bytes."""
    blocks = _blocks(raw, shape, "Q4_K")
    return _with_minima("int4-g32-k", blocks, _group_nibbles(blocks[:, :, 16:]), shape)


def decode_q5_k(raw: Bytes, shape: tuple[int, int]) -> QuantizedMatrix:
    """A matrix (out, in) from its bytes."""
    blocks = _blocks(raw, shape, "Q5_K")
    fifth = blocks[:, :, None, 16:48] >> _BITS & np.uint8(1)
    return _with_minima("int5-g32-k", blocks, _group_nibbles(blocks[:, :, 48:]) | fifth << np.uint8(4), shape)


def decode_q6_k(raw: Bytes, shape: tuple[int, int]) -> QuantizedMatrix:
    """A matrix (out, in) from its bytes."""
    blocks = _blocks(raw, shape, "Q6_K")
    place = blocks.shape[:2]
    low = blocks[:, :, :128].reshape(*place, 2, 1, 64) >> _NIBBLES & _FOUR
    high = blocks[:, :, 128:192].reshape(*place, 2, 1, 32) >> _PAIRS & _TWO
    stored = low.reshape(*place, -1) | high.reshape(*place, -1) << np.uint8(4)
    codes = (stored.view(np.int8) - np.int8(32)).reshape(shape)
    factors = np.ascontiguousarray(blocks[:, :, 192:208]).view(np.int8).reshape(shape[0], -1)
    return QuantizedMatrix(FORMATS.get("int6-g16-k"), codes, _f16_at(blocks, 208), None, factors)


def encode_k_blocks(matrix: QuantizedMatrix, kind: str) -> Bytes:
    """(out, row bytes) of a matrix that one of the decoders made, or whose factors fit six bits likewise."""
    rows, columns = matrix.shape
    place = (rows, columns // SUPERBLOCK)
    assert matrix.sub_scales is not None
    factors = matrix.sub_scales.reshape(*place, -1).view(np.uint8)
    if kind == "Q3_K":
        return np.concatenate(_q3_parts(matrix, place), axis=2).reshape(rows, -1)
    if kind == "Q6_K":
        stored = (matrix.codes + np.int8(32)).view(np.uint8)
        parts = _q6_parts(stored, place)
        parts += [factors, _f16_bytes(matrix.scales)]
        return np.concatenate(parts, axis=2).reshape(rows, -1)
    assert matrix.minima is not None
    assert matrix.sub_minima is not None
    if kind == "Q2_K":
        mixed = factors | matrix.sub_minima.reshape(*place, -1).view(np.uint8) << np.uint8(4)
        codes = _pairs(matrix.codes.view(np.uint8).reshape(*place, 2, 4, 32))
        parts = [mixed, codes, _f16_bytes(matrix.scales), _f16_bytes(-matrix.minima)]
        return np.concatenate(parts, axis=2).reshape(rows, -1)
    parts = [_f16_bytes(matrix.scales), _f16_bytes(-matrix.minima)]
    parts.append(_six_bits(factors, matrix.sub_minima.reshape(*place, -1).view(np.uint8)))
    codes = matrix.codes.view(np.uint8).reshape(*place, 8, 32)
    if kind == "Q5_K":
        parts.append(np.bitwise_or.reduce(codes >> np.uint8(4) << _BITS, axis=2))
    pairs = (codes & _FOUR).reshape(*place, 4, 2, 32)
    parts.append((pairs[:, :, :, 0] | pairs[:, :, :, 1] << np.uint8(4)).reshape(*place, 128))
    return np.concatenate(parts, axis=2).reshape(rows, -1)


def _q3_parts(matrix: QuantizedMatrix, place: tuple[int, int]) -> list[Bytes]:
    assert matrix.sub_scales is not None
    stored = (matrix.codes + np.int8(4)).view(np.uint8).reshape(*place, 2, 4, 32)
    third = np.bitwise_or.reduce((stored >> np.uint8(2)).reshape(*place, 8, 32) << _BITS, axis=2)
    factors = (matrix.sub_scales.reshape(*place, 16) + np.int8(32)).view(np.uint8)
    low = np.bitwise_or.reduce((factors & _FOUR).reshape(*place, 2, 8) << _NIBBLES, axis=2)
    high = np.bitwise_or.reduce((factors >> np.uint8(4)).reshape(*place, 4, 4) << _PAIRS, axis=2)
    return [third, _pairs(stored & _TWO), low, high, _f16_bytes(matrix.scales)]


def _q6_parts(stored: Bytes, place: tuple[int, int]) -> list[Bytes]:
    nibbles = (stored & _FOUR).reshape(*place, 2, 2, 64)
    pairs = (stored >> np.uint8(4)).reshape(*place, 2, 4, 32)
    low = nibbles[:, :, :, 0] | nibbles[:, :, :, 1] << np.uint8(4)
    high = np.bitwise_or.reduce(pairs << _PAIRS, axis=3)
    return [low.reshape(*place, 128), high.reshape(*place, 64)]


def _with_minima(name: str, blocks: Bytes, codes: Bytes, shape: tuple[int, int]) -> QuantizedMatrix:
    first, second, mixed = blocks[:, :, 4:8], blocks[:, :, 8:12], blocks[:, :, 12:16]
    upper = _TWO << np.uint8(4)
    scales = np.concatenate((first & _SIX, mixed & _FOUR | first >> np.uint8(2) & upper), axis=2)
    minima = np.concatenate((second & _SIX, mixed >> np.uint8(4) | second >> np.uint8(2) & upper), axis=2)
    rows = shape[0]
    return QuantizedMatrix(
        FORMATS.get(name), codes.view(np.int8).reshape(shape), _f16_at(blocks, 0), -_f16_at(blocks, 2),
        scales.view(np.int8).reshape(rows, -1), minima.view(np.int8).reshape(rows, -1),
    )  # fmt: skip


def _six_bits(scales: Bytes, minima: Bytes) -> Bytes:
    """(out, blocks, 8) twice -> (out, blocks, 12)."""
    first = [part[:, :, :4] | part[:, :, 4:] >> np.uint8(4) << np.uint8(6) for part in (scales, minima)]
    mixed = scales[:, :, 4:] & _FOUR | minima[:, :, 4:] << np.uint8(4)
    return np.concatenate((*first, mixed), axis=2)


def _group_nibbles(packed: Bytes) -> Bytes:
    """(out, blocks, 128) -> (out, blocks, 8, 32)."""
    pairs = packed.reshape(*packed.shape[:2], 4, 1, 32) >> _NIBBLES & _FOUR
    return pairs.reshape(*packed.shape[:2], 8, 32)


def _group_pairs(packed: Bytes) -> Bytes:
    """(out, blocks, 64) -> (out, blocks, 2, 4, 32)."""
    return packed.reshape(*packed.shape[:2], 2, 1, 32) >> _PAIRS & _TWO


def _pairs(codes: Bytes) -> Bytes:
    """(out, blocks, 2, 4, 32) -> (out, blocks, 64)."""
    packed: Bytes = np.bitwise_or.reduce(codes << _PAIRS, axis=3)
    return packed.reshape(*packed.shape[:2], 64)


def _blocks(raw: Bytes, shape: tuple[int, int], kind: str) -> Bytes:
    return raw.reshape(shape[0], shape[1] // SUPERBLOCK, K_BYTES[kind])


def _f16_at(blocks: Bytes, start: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, :, start : start + 2]).view(np.float16)[:, :, 0]


def _f16_bytes(values: NDArray[np.float16]) -> Bytes:
    return np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, 2)
