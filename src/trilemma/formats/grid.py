"""The grid of a quantized matrix: integer codes, one f16 scale and perhaps one f16 minimum per group.

    symmetric    w = scale * code            code in [-2^(bits-1), 2^(bits-1) - 1]
    asymmetric   w = scale * code + minimum  code in [0, 2^bits - 1]
    codebook     w = scale * code            code is one of `values`, which are not evenly spaced

Groups run along the input dimension; the last one is short where the group size does not divide it.
Scales and minima are rounded to f16 before codes are chosen. Code -8 and negative scales are legal
(that is what lets GGUF's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 lie on these grids bit for bit).

Two levels, as GGUF's Q4_K, Q5_K and Q6_K have them: a group's scale is a signed byte times the f16 scale
of its supergroup, and its minimum likewise. Both products are exact in f32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilemma.core.record import Record


class Format(Record):
    """A storage format. `group` is the number of inputs that share a scale; None means a whole row.

    supergroup: inputs that share the f16 scale, of which each group has a factor; None where there is one level.
    values: the 2^bits codes of a codebook, ascending; None where codes are consecutive.
    """

    name: str
    bits: int
    group: int | None = None
    symmetric: bool = True
    floating: bool = False
    layout: str = "panel16.v1"
    supergroup: int | None = None
    values: tuple[int, ...] | None = None

    def group_size(self, columns: int) -> int:
        return columns if self.group is None else min(self.group, columns)

    def groups(self, columns: int) -> int:
        return -(-columns // self.group_size(columns))

    def f16_groups(self, columns: int) -> int:
        """f16 scales of a row: one a group, or one a supergroup."""
        return self.groups(columns) if self.supergroup is None else -(-columns // self.supergroup)

    @property
    def pairs_factors(self) -> bool:
        """Whether factors of scales and minima are 0..15 and share a byte."""
        return self.supergroup is not None and self.bits == 2

    @property
    def shares_input_scale(self) -> bool:
        """Whether int8 inputs of its products have powers of two of one scale a row, for speed, rather than scales of
        their own for every 32 columns: where few bits of the weights lose far more."""
        return self.bits <= 5

    @property
    def factor_range(self) -> tuple[int, int]:
        """Lowest and highest factor of a group where scales have two levels, as GGUF's blocks hold them."""
        return {2: (0, 15), 3: (-32, 31), 4: (0, 63), 5: (0, 63), 6: (-128, 127)}[self.bits]

    @property
    def code_range(self) -> tuple[int, int]:
        if self.values is not None:
            return self.values[0], self.values[-1]
        if self.symmetric:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    @property
    def legal_codes(self) -> NDArray[np.int8]:
        """Every code, ascending."""
        low, high = self.code_range
        return np.array(range(low, high + 1) if self.values is None else self.values, dtype=np.int8)


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that codes of one matrix can stand for: a QuantizedMatrix without its codes, as a fit leaves it."""

    spec: Format
    scales: NDArray[np.float16]
    minima: NDArray[np.float16] | None = None
    sub_scales: NDArray[np.int8] | None = None
    sub_minima: NDArray[np.int8] | None = None

    def steps(self) -> NDArray[np.float32]:
        """(out, groups) f32: what each group's codes are multiplied with."""
        return _of_groups(self.spec, self.scales, self.sub_scales)

    def offsets(self) -> NDArray[np.float32] | None:
        """(out, groups) f32: what is added to each group's codes; None where the grid is symmetric."""
        return None if self.minima is None else _of_groups(self.spec, self.minima, self.sub_minima)

    def with_codes(self, codes: NDArray[np.int8]) -> QuantizedMatrix:
        return QuantizedMatrix(self.spec, codes, self.scales, self.minima, self.sub_scales, self.sub_minima)


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """Codes, scales and minima of one matrix, unpacked.

    codes: (out, in) int8: what scales are multiplied with;
    scales: (out, groups) float16; minima: (out, groups) float16, or None when symmetric.
    With two levels scales and minima are those of supergroups, and sub_scales and sub_minima, (out, groups) int8,
    their groups' factors.
    """

    spec: Format
    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    minima: NDArray[np.float16] | None = None
    sub_scales: NDArray[np.int8] | None = None
    sub_minima: NDArray[np.int8] | None = None

    @property
    def format(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the packed blobs (padding included), as `pack` lays them out."""
        from trilemma.formats.pack import packed_bytes

        return packed_bytes(self.spec, self.shape)

    def dequantize(self) -> NDArray[np.float32]:
        """(out, in) f32 values, exactly what the kernels compute with."""
        values = self.codes.astype(np.float32) * self._of_inputs(self.scales, self.sub_scales)
        if self.minima is not None:
            values += self._of_inputs(self.minima, self.sub_minima)
        return values

    def rows(self, index: NDArray[np.intp]) -> QuantizedMatrix:
        """The rows of these numbers, in this order."""
        return QuantizedMatrix(
            self.spec, self.codes[index], self.scales[index],
            None if self.minima is None else self.minima[index],
            None if self.sub_scales is None else self.sub_scales[index],
            None if self.sub_minima is None else self.sub_minima[index],
        )  # fmt: skip

    def _of_inputs(self, values: NDArray[np.float16], factors: NDArray[np.int8] | None) -> NDArray[np.float32]:
        """(out, in) f32: what each code is multiplied with, or added to."""
        columns = self.shape[1]
        return np.repeat(_of_groups(self.spec, values, factors), self.spec.group_size(columns), axis=1)[:, :columns]


def _of_groups(spec: Format, values: NDArray[np.float16], factors: NDArray[np.int8] | None) -> NDArray[np.float32]:
    """(out, groups) f32 of each group's scale or minimum."""
    wide = values.astype(np.float32)
    if factors is None:
        return wide
    assert spec.supergroup is not None
    assert spec.group is not None
    return np.repeat(wide, spec.supergroup // spec.group, axis=1)[:, : factors.shape[1]] * factors
