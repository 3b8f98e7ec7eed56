"""Values of groups against lines, value = slope * code + offset, with the nearest codes: errors and the sums behind.

This is the part of fitting that touches every value. What is done with the sums, a group at a time, is `two_level.py`.
Arrays of values are (group size, rows, supergroups, groups), so that sums over a group's values run along the first
axis; arrays by group lack that axis.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from trilemma.formats.grid import Format

Float32 = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Lines:
    """A line a group, (rows, supergroups, groups) each, and what its codes q say with weights w.

    error: sum of w (x - slope q - offset)^2; square, once: sums of w q^2 and w q; best_slope, best_offset: the line of
    least error for the same codes, whose offset is at most 0, and 0 where the grid has no minima.
    """

    slope: Float32
    offset: Float32
    error: Float32
    square: Float32
    once: Float32
    best_slope: Float32
    best_offset: Float32

    def where(self, mask: Flags, other: Lines) -> Lines:
        """These where the mask is set, elsewhere the others."""
        return Lines(*(np.where(mask, getattr(self, one.name), getattr(other, one.name)) for one in fields(self)))

    def better(self, other: Lines) -> Lines:
        """Of each group the line of less error."""
        return self.where(self.error <= other.error, other)


class Groups:
    """Values x and the weights of their squared errors (rows may be 1), with the codes of a format."""

    def __init__(self, spec: Format, x: Float32, weight: Float32) -> None:
        self.spec, self.x, self.weight = spec, x, weight
        self.low, self.high = spec.code_range
        self.total: Float32 = np.broadcast_to(weight.sum(axis=0), x.shape[1:])
        self._root = np.sqrt(weight)
        self._codes, self._rest, self._weighted = np.empty_like(x), np.empty_like(x), np.empty_like(x)

    def lines(self, slope: Float32, offset: Float32) -> Lines:
        """The lines of these slopes and offsets with the nearest codes; code 0 where the slope is 0."""
        codes, rest, weighted = self._scaled(slope, offset), self._rest, self._weighted
        np.clip(np.rint(codes, out=codes), self.low, self.high, out=codes)
        np.multiply(codes, slope, out=rest)
        rest += offset
        np.subtract(self.x, rest, out=rest)
        np.multiply(codes, self.weight, out=weighted)
        square, once, along = _sums(weighted, codes), weighted.sum(axis=0), _sums(weighted, rest)
        np.multiply(rest, self.weight, out=weighted)
        error = _sums(weighted, rest)
        best = self._best(slope, offset, square, once, along, weighted.sum(axis=0))
        return Lines(slope, offset, error, square, once, *best)

    def errors(self, slope: Float32, offset: Float32) -> Float32:
        """The error of these lines alone, at half the price; no slope may be 0."""
        scaled, codes = self._scaled(slope, offset), self._rest
        np.clip(np.rint(scaled, out=codes), self.low, self.high, out=codes)
        scaled -= codes
        scaled *= self._root
        return np.asarray(_sums(scaled, scaled) * np.square(slope))

    def range_lines(self) -> tuple[Float32, Float32]:
        """Slope and offset that just hold all values of a group; a symmetric grid gives the largest the lowest code,
        whatever its sign."""
        top, bottom = self.x.max(axis=0), self.x.min(axis=0)
        if self.spec.symmetric:
            return np.where(top > -bottom, top, bottom) / np.float32(self.low), np.zeros_like(top)
        bottom = np.minimum(bottom, np.float32(0))
        return np.maximum(top - bottom, np.float32(0)) / np.float32(self.high), bottom

    def _scaled(self, slope: Float32, offset: Float32) -> Float32:
        """Values in units of codes, not rounded; 0 where the slope is 0."""
        inverse = np.divide(np.float32(1), slope, out=np.zeros_like(slope), where=slope != 0)
        np.subtract(self.x, offset, out=self._codes)
        self._codes *= inverse
        return self._codes

    def _best(
        self, slope: Float32, offset: Float32, square: Float32, once: Float32, along: Float32, rest: Float32
    ) -> tuple[Float32, Float32]:
        """From the sums of w q (along) and w (rest) times what the line leaves of the values."""
        alone = slope + quotient(along + offset * once, square)  # through zero
        if self.spec.symmetric:
            return alone, offset
        determinant = square * self.total - once * once
        found = determinant > np.float32(1e-6) * square * self.total
        by = np.divide(np.float32(1), determinant, out=np.zeros_like(determinant), where=found)
        free_slope = slope + (self.total * along - once * rest) * by
        shift = np.where(found, (square * rest - once * along) * by, quotient(rest, self.total))
        inside = offset + shift <= 0
        return np.where(inside, free_slope, alone), np.where(inside, offset + shift, np.float32(0))


def quotient(above: Float32, below: Float32) -> Float32:
    """above / below, and 0 where below is 0; shapes are broadcast."""
    above, below = np.broadcast_arrays(above, below)
    return np.divide(above, below, out=np.zeros(above.shape, np.float32), where=below != 0)


def _sums(first: Float32, second: Float32) -> Float32:
    return np.asarray(np.einsum("i...,i...->...", first, second))
