"""Packing: an unpacked quantized matrix to the blobs of its layout, and back.

A layout is a versioned name (`panel16.v1`); one that this release does not know is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError
from trilemma.formats import FORMATS, panel16
from trilemma.formats.grid import Format, QuantizedMatrix

LAYOUTS = ("panel16.v1", "panel16.v2", "panel16.v3", "rows.v1")


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """One matrix as it lies in memory and on disk.

    codes: flat uint8; scales and minima: flat float16 (minima None when symmetric); sub_scales and sub_minima: flat
    int8 (None where scales have one level); `shape` is (out, in) without padding.
    """

    spec: Format
    shape: tuple[int, int]
    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    minima: NDArray[np.float16] | None = None
    sub_scales: NDArray[np.int8] | None = None
    sub_minima: NDArray[np.int8] | None = None

    def parts(self) -> dict[str, NDArray[Any]]:
        """The blobs that this matrix has, by name, in the order of `blob_bytes`."""
        every: dict[str, NDArray[Any] | None] = {
            "codes": self.codes, "scales": self.scales, "minima": self.minima,
            "sub_scales": self.sub_scales, "sub_minima": self.sub_minima,
        }  # fmt: skip
        return {name: values for name, values in every.items() if values is not None}

    @property
    def format(self) -> str:
        return self.spec.name

    @property
    def nbytes(self) -> int:
        """Bytes of all blobs, padding included."""
        return sum(values.nbytes for values in self.parts().values())

    def dequantize(self) -> NDArray[np.float32]:
        """(out, in) f32 values, exactly what the kernels compute with."""
        return unpack(self).dequantize()


def check_layout(layout: str) -> None:
    """Raises CheckpointError for a layout that this release does not know."""
    if layout not in LAYOUTS:
        raise CheckpointError(
            f"Unknown tensor layout '{layout}'. This release reads {', '.join(LAYOUTS)}: "
            "update Trilemma, or make the artifact again with this release."
        )


def packed_bytes(spec: Format, shape: tuple[int, int]) -> int:
    """Bytes of a matrix (out, in) in this format, padding included."""
    return sum(blob_bytes(spec, shape).values())


def format_bytes(format_name: str, shape: tuple[int, int]) -> int:
    """Bytes of a matrix (out, in) in the format of this name, scales and padding included."""
    return packed_bytes(FORMATS.get(format_name), shape)


def blob_bytes(spec: Format, shape: tuple[int, int]) -> dict[str, int]:
    """Bytes of each blob of a matrix (out, in): 'values', or 'codes', 'scales' and what the grid has more."""
    if spec.floating:
        return {"values": shape[0] * shape[1] * spec.bits // 8}
    check_layout(spec.layout)
    scales = 2 * panel16.scales_count(spec, shape)
    blobs = {"codes": panel16.codes_bytes(spec, shape), "scales": scales}
    if not spec.symmetric:
        blobs["minima"] = scales
    if spec.supergroup is not None:
        for part in ("sub_scales",) if spec.symmetric or spec.pairs_factors else ("sub_scales", "sub_minima"):
            blobs[part] = panel16.factors_count(spec, shape)
    return blobs


def pack(matrix: QuantizedMatrix) -> PackedMatrix:
    """Lay the codes, scales and minima out as the format's layout says."""
    check_layout(matrix.spec.layout)
    spec, columns = matrix.spec, matrix.shape[1]
    scales, factors = panel16.scale_groups(spec, columns), panel16.factor_groups(spec, columns)
    sub_scales, sub_minima = matrix.sub_scales, matrix.sub_minima
    if spec.pairs_factors and sub_scales is not None and sub_minima is not None:
        sub_scales, sub_minima = sub_scales | sub_minima << np.int8(4), None
    return PackedMatrix(
        spec, matrix.shape, panel16.pack_codes(spec, matrix.codes), panel16.pack_scales(matrix.scales, scales),
        None if matrix.minima is None else panel16.pack_scales(matrix.minima, scales),
        None if sub_scales is None else panel16.pack_scales(sub_scales, factors),
        None if sub_minima is None else panel16.pack_scales(sub_minima, factors),
    )  # fmt: skip


def unpack(matrix: PackedMatrix) -> QuantizedMatrix:
    """The inverse of `pack`. Raises CheckpointError when a blob has the wrong size."""
    check_layout(matrix.spec.layout)
    check_blobs(matrix)
    spec, (rows, columns) = matrix.spec, matrix.shape
    scales, factors = (rows, panel16.scale_groups(spec, columns)), (rows, panel16.factor_groups(spec, columns))
    wide, groups = spec.f16_groups(columns), spec.groups(columns)
    sub_scales, sub_minima = matrix.sub_scales, matrix.sub_minima
    if spec.pairs_factors and sub_scales is not None:
        sub_scales, sub_minima = sub_scales & np.int8(15), sub_scales >> np.int8(4) & np.int8(15)
    return QuantizedMatrix(
        spec, panel16.unpack_codes(spec, matrix.codes, matrix.shape),
        panel16.unpack_scales(matrix.scales, scales)[:, :wide],
        None if matrix.minima is None else panel16.unpack_scales(matrix.minima, scales)[:, :wide],
        None if sub_scales is None else panel16.unpack_scales(sub_scales, factors)[:, :groups],
        None if sub_minima is None else panel16.unpack_scales(sub_minima, factors)[:, :groups],
    )  # fmt: skip


def join_rows(parts: Sequence[PackedMatrix]) -> PackedMatrix:
    """One matrix of packed ones of the same columns below each other; all but the last have whole panels of rows."""
    first = parts[0]
    assert all(part.shape[0] % panel16.PANEL_ROWS == 0 for part in parts[:-1])
    if len(parts) == 1:
        return first
    joined = {name: np.concatenate([part.parts()[name] for part in parts]) for name in first.parts()}
    return PackedMatrix(first.spec, (sum(part.shape[0] for part in parts), first.shape[1]), **joined)


def check_blobs(matrix: PackedMatrix) -> None:
    """Raises CheckpointError when the blobs do not have the sizes that format and shape call for."""
    expected = blob_bytes(matrix.spec, matrix.shape)
    found = {name: values.nbytes for name, values in matrix.parts().items()}
    if found != expected:
        raise CheckpointError(
            f"A {matrix.format} matrix of shape {matrix.shape} has blobs {found} bytes; expected {expected}."
        )
