"""From GGUF's blocks to our grids and plain matrices: one decoder for each block type that is read.

The inverse of `encode_blocks` and `encode_k_blocks`: codes, scales and minima stay what they are. A type that no grid
here holds (most IQ types) is refused by name; reading it is one more entry of DECODERS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.formats import FORMATS
from trilemma.formats.gguf.blocks import BLOCK
from trilemma.formats.gguf.k_blocks import decode_q2_k, decode_q3_k, decode_q4_k, decode_q5_k, decode_q6_k
from trilemma.formats.grid import QuantizedMatrix
from trilemma.model.model import Float32, StoredMatrix
from trilemma.model.plain import PlainMatrix, bf16_to_f32

Bytes = NDArray[np.uint8]
Decoded = Float32 | StoredMatrix
Decoder = Callable[[Bytes, tuple[int, int]], Decoded]

FORMAT_OF = {
    "F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "int8-g32", "Q4_0": "int4-g32", "Q4_1": "int4-g32-asym",
    "Q5_0": "int5-g32", "Q5_1": "int5-g32-asym", "Q4_K": "int4-g32-k", "Q5_K": "int5-g32-k", "Q6_K": "int6-g16-k",
    "Q2_K": "int2-g16-k", "Q3_K": "int3-g16-k", "IQ4_NL": "nl4-g32",
}  # fmt: skip


def format_of(kind: str, name: str) -> str:
    """Our format of a GGML type. Raises UnsupportedModelError for one that no format here holds."""
    if kind not in FORMAT_OF:
        raise UnsupportedModelError(
            f"Tensor '{name}' has the GGUF type {kind}, which is not read here yet; {', '.join(FORMAT_OF)} are. Run "
            "the file with --runtime llama.cpp, start from the original model, or store it again: "
            "llama-quantize --allow-requantize model.gguf other.gguf Q8_0."
        )
    return FORMAT_OF[kind]


def decode_matrix(raw: Bytes, kind: str, shape: tuple[int, int], name: str) -> Decoded:
    """A matrix (out, in) from its bytes.

    Raises:
        UnsupportedModelError: a type without a decoder. CheckpointError: values or scales that are not finite.
    """
    format_of(kind, name)
    found = DECODERS[kind](raw, shape)
    if not _finite(found):
        raise CheckpointError(f"GGUF tensor '{name}' has NaN or infinite values: the file is damaged. Fetch it again.")
    return found


def decode_vector(raw: Bytes, kind: str, name: str) -> Float32:
    """A vector (n,) of F32, F16 or BF16 as f32."""
    values = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    if kind not in values:
        raise UnsupportedModelError(f"Tensor '{name}' is a vector of GGUF type {kind}; F32, F16 and BF16 are read.")
    stored = raw.view(values[kind])
    found: Float32 = bf16_to_f32(stored) if kind == "BF16" else stored.astype(np.float32)
    if not np.isfinite(found).all():
        raise CheckpointError(f"GGUF tensor '{name}' has NaN or infinite values: the file is damaged. Fetch it again.")
    return found


def take_rows(stored: Decoded, rows: NDArray[np.intp]) -> Decoded:
    """The matrix with its rows in another order."""
    if isinstance(stored, QuantizedMatrix):
        return stored.rows(rows)
    if isinstance(stored, PlainMatrix):
        return PlainMatrix(stored.dtype, stored.bits[rows])
    assert isinstance(stored, np.ndarray)
    return np.ascontiguousarray(stored[rows])


def _f32(raw: Bytes, shape: tuple[int, int]) -> Decoded:
    return raw.view(np.float32).reshape(shape)


def _f16(raw: Bytes, shape: tuple[int, int]) -> Decoded:
    return PlainMatrix("f16", raw.view(np.float16).reshape(shape))


def _bf16(raw: Bytes, shape: tuple[int, int]) -> Decoded:
    return PlainMatrix("bf16", raw.view(np.uint16).reshape(shape))


def _q8_0(raw: Bytes, shape: tuple[int, int]) -> Decoded:
    blocks = _blocks(raw, shape, 34)
    codes = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).reshape(shape)
    return QuantizedMatrix(FORMATS.get("int8-g32"), codes, _f16_at(blocks, 0))


def _q4_0(raw: Bytes, shape: tuple[int, int]) -> Decoded:
    blocks = _blocks(raw, shape, 18)
    codes = (_nibbles(blocks[:, :, 2:]).view(np.int8) - np.int8(8)).reshape(shape)
    return QuantizedMatrix(FORMATS.get("int4-g32"), codes, _f16_at(blocks, 0))


def _iq4_nl(raw: Bytes, shape: tuple[int, int]) -> Decoded:
    """f16 d, 16 bytes of nibbles: d * values[q]."""
    blocks, spec = _blocks(raw, shape, 18), FORMATS.get("nl4-g32")
    return QuantizedMatrix(spec, spec.legal_codes[_nibbles(blocks[:, :, 2:]).reshape(shape)], _f16_at(blocks, 0))


def _q4_1(raw: Bytes, shape: tuple[int, int]) -> Decoded:
    blocks = _blocks(raw, shape, 20)
    codes = _nibbles(blocks[:, :, 4:]).view(np.int8).reshape(shape)
    return QuantizedMatrix(FORMATS.get("int4-g32-asym"), codes, _f16_at(blocks, 0), _f16_at(blocks, 2))


def _q5_0(raw: Bytes, shape: tuple[int, int]) -> Decoded:
    """f16 d, 4 bytes of fifth bits, 16 of nibbles: d * (q - 16)."""
    blocks = _blocks(raw, shape, 22)
    codes = (_with_fifth_bits(blocks[:, :, 2:]).view(np.int8) - np.int8(16)).reshape(shape)
    return QuantizedMatrix(FORMATS.get("int5-g32"), codes, _f16_at(blocks, 0))


def _q5_1(raw: Bytes, shape: tuple[int, int]) -> Decoded:
    """f16 d, f16 m, 4 bytes of fifth bits, 16 of nibbles: d * q + m."""
    blocks = _blocks(raw, shape, 24)
    codes = _with_fifth_bits(blocks[:, :, 4:]).view(np.int8).reshape(shape)
    return QuantizedMatrix(FORMATS.get("int5-g32-asym"), codes, _f16_at(blocks, 0), _f16_at(blocks, 2))


DECODERS: Mapping[str, Decoder] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl, "Q2_K": decode_q2_k, "Q3_K": decode_q3_k,
    "Q4_K": decode_q4_k, "Q5_K": decode_q5_k, "Q6_K": decode_q6_k,
}  # fmt: skip


def _blocks(raw: Bytes, shape: tuple[int, int], size: int) -> Bytes:
    """(out, blocks, size) bytes."""
    return raw.reshape(shape[0], shape[1] // BLOCK, size)


def _f16_at(blocks: Bytes, start: int) -> NDArray[np.float16]:
    """(out, blocks) f16 from two bytes of each block."""
    return np.ascontiguousarray(blocks[:, :, start : start + 2]).view(np.float16)[:, :, 0]


def _nibbles(packed: Bytes) -> Bytes:
    """(out, blocks, 16) -> (out, blocks, 32): low nibbles are values 0..15, high ones 16..31."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=2)


def _with_fifth_bits(packed: Bytes) -> Bytes:
    """(out, blocks, 4 + 16) -> (out, blocks, 32): a bit of each value in order, then the nibbles."""
    fifth = np.unpackbits(np.ascontiguousarray(packed[:, :, :4]), axis=2, bitorder="little")
    return _nibbles(packed[:, :, 4:]) | fifth << np.uint8(4)


def _finite(found: Any) -> bool:
    if isinstance(found, QuantizedMatrix):
        parts = [found.scales] if found.minima is None else [found.scales, found.minima]
        return all(bool(np.isfinite(part).all()) for part in parts)
    if isinstance(found, PlainMatrix) and found.dtype == "bf16":
        return bool(((found.bits & 0x7F80) != 0x7F80).all())  # type: ignore[operator]
    return bool(np.isfinite(found.bits if isinstance(found, PlainMatrix) else found).all())
