"""Which documents share text: hashed 13-word shingles, vectorised over bytes.

Words are runs of letters and digits, ASCII case folded. A word's hash is a difference of polynomial
prefix sums modulo 2^64; collisions are about n^2 / 2^64, which is nothing for texts of gigabytes.
13 words is the length that Brown et al. 2020 (arXiv 2005.14165, appendix C) use against contamination.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

SHINGLE_WORDS = 13
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))


def shingle_hashes(text: str, words: int = SHINGLE_WORDS) -> Hashes:
    """Sorted unique hashes of all runs of `words` words; of the whole text when it is shorter."""
    hashes = _word_hashes(text)
    if hashes.size == 0:
        return hashes
    width = min(words, hashes.size)
    count = hashes.size - width + 1
    total = np.zeros(count, np.uint64)
    factor = np.uint64(1)
    for offset in range(width):
        total += hashes[offset : offset + count] * factor
        factor = np.multiply(factor, _BASE)
    return sorted_unique(_mix(total + np.uint64(width)))


def sorted_unique(values: Hashes) -> Hashes:
    """As np.unique, several times faster on 64-bit hashes."""
    ordered = np.sort(values)
    return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))] if ordered.size else ordered


def shared_fraction(hashes: Hashes, pool: Hashes) -> float:
    """Share of a document's shingles that occur in a sorted pool."""
    if hashes.size == 0 or pool.size == 0:
        return 0.0
    at = np.minimum(np.searchsorted(pool, hashes), pool.size - 1)
    return float(np.mean(pool[at] == hashes))


def group_similar(hashes: Sequence[Hashes], threshold: float) -> list[list[int]]:
    """Groups of documents that share at least `threshold` of the smaller one's shingles, transitively.

    Documents that share a shingle are compared along a chain in their order, so text that occurs in
    thousands of documents costs thousands of comparisons and not millions.
    """
    parent = list(range(len(hashes)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for first, second, shared in _chained_pairs(hashes):
        if shared >= threshold * min(hashes[first].size, hashes[second].size):
            parent[root(second)] = root(first)
    groups: dict[int, list[int]] = {}
    for item in range(len(hashes)):
        groups.setdefault(root(item), []).append(item)
    return list(groups.values())


def _chained_pairs(hashes: Sequence[Hashes]) -> list[tuple[int, int, int]]:
    if not hashes:
        return []
    values = np.concatenate(list(hashes))
    owners = np.repeat(np.arange(len(hashes)), [item.size for item in hashes])
    order = np.lexsort((owners, values))
    values, owners = values[order], owners[order]
    same = np.flatnonzero(values[1:] == values[:-1])
    keys = owners[same].astype(np.int64) * len(hashes) + owners[same + 1]
    pairs, counts = np.unique(keys, return_counts=True)
    return [
        (int(key // len(hashes)), int(key % len(hashes)), int(count)) for key, count in zip(pairs, counts, strict=True)
    ]


def _word_hashes(text: str) -> Hashes:
    codes = np.frombuffer(text.encode(), np.uint8)
    if codes.size == 0:
        return np.zeros(0, np.uint64)
    lower = np.where((codes >= 65) & (codes <= 90), codes + 32, codes)
    inside = ((lower >= 97) & (lower <= 122)) | ((lower >= 48) & (lower <= 57)) | (lower >= 128)
    edges = np.diff(np.concatenate(([0], inside.view(np.int8), [0])))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    powers = np.cumprod(np.full(codes.size, _BASE, np.uint64))
    inverses = np.cumprod(np.full(codes.size, _INVERSE, np.uint64))
    prefix = np.concatenate((np.zeros(1, np.uint64), np.cumsum(powers * (lower.astype(np.uint64) + np.uint64(1)))))
    return _mix((prefix[ends] - prefix[starts]) * inverses[starts])


def _mix(values: Hashes) -> Hashes:
    """The finaliser of splitmix64: neighbouring sums become unrelated."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
