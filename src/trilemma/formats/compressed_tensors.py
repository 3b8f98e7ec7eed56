"""Matrices as compressed-tensors keeps them (transformers, vLLM): what fits without loss, and the stored parts.

    pack-quantized   weight_packed (out, in/8 or in/4) int32: codes of 4 or 8 bits plus half their range, the first
                     column lowest; weight_scale (out, groups); weight_shape [out, in]. Inputs in 16 bits.
    int-quantized    weight (out, in) int8; weight_scale (out, 1). Inputs in int8 with a scale a token.

    w = scale * code

Both readers have kernels for 4 and 8 bits, so codes of 2 and 3 bits go out as 4 and those of 5 to 7 as 8, with the
same values. An asymmetric grid has an integer zero point there and a float minimum here: it does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import RecipeError
from trilemma.formats import FORMATS
from trilemma.formats.grid import Format, QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, unpack
from trilemma.formats.quantize import quantize_rtn
from trilemma.model.model import Float32, StoredMatrix

Compression = Literal["pack-quantized", "int-quantized"]
GROUPS = (32, 64, 128)  # for which vLLM has kernels
FITTING_FORMATS = ("f32", "f16", "bf16", "symmetric integers in groups of 32, 64 or 128, or one scale a row")


@dataclass(frozen=True)
class Scheme:
    """How matrices are stored: bits 4 or 8; group: inputs that share a scale, None: a whole row; requantized: the
    format to which values are rounded again, None where codes and scales stay as they are."""

    compression: Compression
    bits: int
    group: int | None
    requantized: str | None = None

    @property
    def label(self) -> str:
        inputs = 8 if self.compression == "int-quantized" else 16
        return f"W{self.bits}A{inputs}" + (f"-g{self.group}" if self.group else "")

    def config(self) -> dict[str, Any]:
        """The scheme's entry in `config_groups`, without its targets."""
        weights: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        return {
            "format": self.compression, "weights": weights, "output_activations": None,
            "input_activations": inputs if self.compression == "int-quantized" else None,
        }  # fmt: skip


def scheme_of(spec: Format, columns: int, *, int8_inputs: bool) -> Scheme | None:
    """The scheme that holds a format's values, or None where there is none.

    Args:
        int8_inputs: the products here round their inputs to int8; they do there too where one scale is for a row.
    """
    group = None if spec.group is None or spec.group > columns else spec.group
    if spec.floating or not spec.symmetric or spec.supergroup is not None or spec.bits > 8:
        return None
    if spec.values is not None:  # codes are not evenly spaced
        return None
    if group is not None and (group not in GROUPS or columns % group):
        return None
    bits = 4 if spec.bits <= 4 else 8
    if spec.bits == 8 and group is None and int8_inputs:
        return Scheme("int-quantized", 8, None)
    return Scheme("pack-quantized", bits, group)


def nearest_scheme(columns: int) -> Scheme:
    """The scheme for requantizing what has none of its own: 8 bits in groups of 32, or a row where these do not fit."""
    grouped = columns % 32 == 0
    return Scheme("pack-quantized", 8, 32 if grouped else None, "int8-g32" if grouped else "int8-channel")


def fitted(stored: Float32 | StoredMatrix, scheme: Scheme) -> QuantizedMatrix:
    """The matrix on the grid of its scheme: as it is, or rounded again.

    Raises:
        RecipeError: it stays as it is, but its values are not scale times code.
    """
    if scheme.requantized is not None:
        values = stored if isinstance(stored, np.ndarray) else stored.dequantize()
        return quantize_rtn(values, FORMATS.get(scheme.requantized))
    assert isinstance(stored, PackedMatrix | QuantizedMatrix)
    matrix = unpack(stored) if isinstance(stored, PackedMatrix) else stored
    some = matrix.rows(np.arange(min(16, matrix.shape[0])))
    scales = np.repeat(some.scales.astype(np.float32), matrix.spec.group_size(matrix.shape[1]), axis=1)
    if not np.array_equal(some.dequantize(), some.codes * scales[:, : matrix.shape[1]]):
        raise RecipeError(f"'{matrix.format}' is no grid of scale times code, so compressed-tensors can not hold it.")
    return matrix


def stored_parts(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> safetensors dtype and shape of what a matrix (out, in) is stored as."""
    rows, columns = shape
    scales = ("F16", (rows, columns // scheme.group if scheme.group else 1))
    if scheme.compression == "int-quantized":
        return {"weight": ("I8", shape), "weight_scale": scales}
    packed = ("I32", (rows, -(-columns * scheme.bits // 32)))
    return {"weight_packed": packed, "weight_scale": scales, "weight_shape": ("I64", (2,))}


def part_values(matrix: QuantizedMatrix, scheme: Scheme, part: str) -> NDArray[Any]:
    """The values of one of `stored_parts`."""
    if part == "weight_scale":
        return matrix.scales
    if part == "weight_shape":
        return np.asarray(matrix.shape, np.int64)
    return matrix.codes if part == "weight" else pack_int32(matrix.codes, scheme.bits)


def pack_int32(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """(out, in) codes to (out, in * bits / 32) words: each biased by half the range, the first in the lowest bits.

    A row that does not fill its last word is filled up with zero bits.
    """
    per_word = 32 // bits
    biased = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint32)
    full = np.pad(biased, ((0, 0), (0, -codes.shape[1] % per_word)))
    words = full.reshape(codes.shape[0], -1, per_word) << (np.uint32(bits) * np.arange(per_word, dtype=np.uint32))
    return np.ascontiguousarray(np.bitwise_or.reduce(words, axis=2)).view(np.int32)
