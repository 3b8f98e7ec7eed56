"""Random rotations of any size that mix all channels: signs, then a Hadamard transform with a Hartley factor.

A Hadamard matrix has entries of one size, so that it spreads an outlier evenly, and works as a few sums and
differences. A power of two has one; an odd factor of the size takes the discrete Hartley transform instead, whose
entries are cos + sin of a Fourier transform's angles: real, orthogonal, symmetric, at any size, and at most sqrt(2)
times as large as if all were equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from trilemma.model.model import Float32

_FACTOR = 64  # the largest power of two that is multiplied as one matrix


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R that mixes the channels within each group: x -> x R on the last axis.

    groups: indices of channels; each channel is in one of them. signs: (channels,) of -1 and 1.
    keeps_mean: the sum of each group's channels stays what it was, as a norm that subtracts the mean needs it.
    """

    groups: tuple[NDArray[np.intp], ...]
    signs: Float32
    keeps_mean: bool = False

    @classmethod
    def random(cls, groups: Sequence[NDArray[np.intp]], seed: Sequence[int], *, keeps_mean: bool = False) -> Rotation:
        """Signs drawn from `seed`."""
        channels = sum(len(group) for group in groups)
        signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), channels)
        return cls(tuple(groups), signs, keeps_mean)

    @classmethod
    def of_heads(cls, heads: int, head_dim: int, seed: Sequence[int]) -> Rotation:
        """Each head by itself."""
        return cls.random(list(np.arange(heads * head_dim).reshape(heads, head_dim)), seed)

    def for_queries(self, queries: int) -> Rotation:
        """Of key-value heads: the rotation of the outputs of query heads, `queries` of them for each."""
        heads, head_dim = len(self.groups), len(self.groups[0])
        signs = np.repeat(self.signs.reshape(heads, head_dim), queries, axis=0).reshape(-1)
        return Rotation(tuple(np.arange(heads * queries * head_dim).reshape(-1, head_dim)), signs)

    def turn(self, x: Float32) -> Float32:
        """x R, of x (..., channels)."""
        out = np.empty(x.shape, np.float32)
        for group in self.groups:
            out[..., group] = self._turn_group(x[..., group], self.signs[group])
        return out

    def turn_rows(self, x: Float32) -> Float32:
        """R^T x, of x (channels, ...): what makes turned outputs; a vector is turned as it is."""
        turned: Float32 = np.ascontiguousarray(self.turn(x.T).T)
        return turned

    def _turn_group(self, x: Float32, signs: Float32) -> Float32:
        mixed = mix(x * signs)
        if not self.keeps_mean:
            return mixed
        # the mirror image that brings the turned (1, ..., 1) back to where it was
        ones = np.ones(x.shape[-1], np.float64)
        mirror = mix((ones * signs).astype(np.float32)).astype(np.float64) - ones
        size = float(mirror @ mirror)
        if size < 1e-12 * len(ones):
            return mixed
        unit = (mirror / np.sqrt(size)).astype(np.float32)
        back: Float32 = mixed - 2 * (mixed @ unit)[..., None] * unit
        return back


def mix(x: Float32) -> Float32:
    """x K, of x (..., n): K the orthonormal Hadamard matrix where n is a power of two, else with a Hartley factor.

    K is its own inverse, and no entry is larger than sqrt(2 / n).
    """
    n = x.shape[-1]
    out = x.reshape(-1, n)
    for factor in _factors(n):  # each takes the first of the axes that n is split into and puts it last
        split = out.reshape(-1, factor, n // factor)
        out = np.matmul(np.swapaxes(split, 1, 2), _matrix(factor)).reshape(-1, n)
    mixed: Float32 = out.reshape(x.shape)
    return mixed


def _factors(n: int) -> list[int]:
    even = n & -n  # the largest power of two that divides it
    found = [] if n == even else [n // even]
    while even > 1:
        found.append(min(even, _FACTOR))
        even //= found[-1]
    return found


@cache
def _matrix(n: int) -> Float32:
    """Hadamard (Sylvester's) of a power of two, Hartley of an odd size; orthonormal and symmetric."""
    at = np.arange(n)
    if n & (n - 1):
        angles = 2 * np.pi * (np.outer(at, at) % n) / n
        entries = np.cos(angles) + np.sin(angles)
    else:
        entries = np.where(np.bitwise_count(at[:, None] & at) % 2, -1.0, 1.0)
    scaled: Float32 = (entries / np.sqrt(n)).astype(np.float32)
    return scaled
