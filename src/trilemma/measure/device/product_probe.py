"""Times of single matrix products by format, shape and tokens, through the engine's own kernels.

For each format and shape a pool of random matrices is made that is several times larger than the last cache. Walking
over its first few matrices gives the time in cache, over all of them that of weights streamed from memory. Left out:
formats other than the four below (the nearest one stands for them, see `product_time`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise

from trilemma import _native
from trilemma.core.host_tables import ProductTime
from trilemma.formats.pack import format_bytes
from trilemma.formats.random_weights import with_random_weights
from trilemma.measure.device.tries import Try, typical
from trilemma.model.config import DecoderConfig, Dense, LayerSpec
from trilemma.model.model import Activation, Model
from trilemma.model.sources import RandomSource
from trilemma.runtime.native import load_weights

FORMATS: tuple[tuple[str, Activation], ...] = (
    ("f32", "f32"),
    ("bf16", "bf16"),
    ("int8-g32", "int8-g32"),
    ("int4-g32", "int8-g32"),
)
SHAPES = (
    (128, 128), (128, 384), (384, 128), (384, 384), (128, 1024), (1024, 128), (384, 1024), (1024, 384),
    (1024, 1024), (3072, 384), (384, 3072), (3072, 1024), (1024, 3072), (12288, 384),
)  # fmt: skip
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
STREAMED_SHAPES = ((1024, 384), (1024, 1024))  # these also from larger working sets
STREAMED_TOKENS = (1, 8, 32, 128)
_TRY_S = 1.5e-3  # about what a try takes: shorter than a scheduler's slice, so that neighbours miss most of them
_PER_TOKEN = 1.1
_LONGEST_S = 2e-3  # products that take longer are left to the fit: long times are proportional
_MOST_MATRICES = 768  # of a pool: making them takes time too
_FASTEST_BYTES = 4e10  # a second and thread, to choose how many matrices fill a try
_FASTEST_MACS = {"f32": 4e10, "bf16": 4e10, "int8-g32": 1.5e11}


@dataclass(frozen=True)
class ProductKey:
    """One cell of the table."""

    format: str
    activation: Activation
    threads: int
    tokens: int
    rows: int
    cols: int
    working_set_bytes: int

    def row(self, seconds: float) -> ProductTime:
        return ProductTime(**vars(self), seconds=seconds)


class Pool:
    """Random matrices (rows, cols) in one format, of about `nbytes` together."""

    def __init__(self, format_name: str, activation: Activation, rows: int, cols: int, nbytes: int) -> None:
        self.one = format_bytes(format_name, (rows, cols))
        self.count = max(1, min(_MOST_MATRICES, round(nbytes / self.one)))
        layer = LayerSpec(attention=None, ffn=Dense(hidden=rows, gated=False))
        config = DecoderConfig(
            family="llama", dim=cols, vocab_size=16, max_context=16, layers=(layer,) * self.count, norm_eps=1e-5,
            tied=True,
        )  # fmt: skip
        # The way back to `cols` is there as well, but never walked over: the cheapest format will do.
        twin = with_random_weights(
            Model(config, RandomSource(config)),
            lambda name: format_name if name.endswith("up.weight") else "int4-g32",
            activation_of=lambda name: activation if name.endswith("up.weight") else "int8-g32",
        )
        self.weights = load_weights(twin)
        self.weights.settle(threads=1)
        self.key = partial(ProductKey, format_name, activation, rows=rows, cols=cols)
        self._names = [f"layers.{index}.ffn.up.weight" for index in range(self.count)]
        self._macs_s = rows * cols / _FASTEST_MACS[activation]

    def cached(self, tokens: int, threads: int, working_set: int) -> tuple[ProductKey, Try]:
        """A cell, and the function that times it once: walks over so many bytes, the first of them not counted."""
        one_s = self._least_s(tokens, threads)
        count = min(self.count, max(1, round(working_set / self.one)))
        if tokens > 1:  # arithmetic takes most of the time: a short walk does
            count = max(1, min(count, round(_TRY_S / one_s)))
        jobs = [[name] for name in self._names[:count]]
        passes = 1 + max(1, round(_TRY_S / (one_s * count)))

        def once() -> float:
            walks = _native.time_products(self.weights, jobs, tokens=tokens, threads=threads, passes=passes)
            return typical(walks[1:]) / count

        return self.key(threads=threads, tokens=tokens, working_set_bytes=count * self.one), once

    def streamed(self, tokens: int, threads: int) -> tuple[ProductKey, Try]:
        """The same from memory: each try walks once over other matrices, which nobody has read for a long time."""
        count = max(1, min(self.count // 3, round(_TRY_S / self._least_s(tokens, threads))))
        starts = cycle(range(0, self.count - count + 1, count))

        def once() -> float:
            first = next(starts)
            jobs = [[name] for name in self._names[first : first + count]]
            return _native.time_products(self.weights, jobs, tokens=tokens, threads=threads, passes=1)[0] / count

        return self.key(threads=threads, tokens=tokens, working_set_bytes=self.count * self.one), once

    def _least_s(self, tokens: int, threads: int) -> float:
        return max(tokens * self._macs_s, self.one / _FASTEST_BYTES) / threads

    def too_long(self, tokens: int, threads: int) -> bool:
        return tokens > 1 and self._least_s(tokens, threads) > _LONGEST_S


def product_probes(
    threads: Iterable[int], working_sets: tuple[int, ...], *, quick: bool = False
) -> Iterator[tuple[ProductKey, Try]]:
    """All cells: every shape at the smallest working set, some at all of them.

    Args:
        threads: numbers of threads to time.
        working_sets: bytes, ascending; the first fits in cache, the last does not.
        quick: fewer numbers of tokens and shapes.
    """
    small, larger = working_sets[0], working_sets[1:]
    tokens_of = tuple(n for n in TOKENS if n in (1, 4, 16, 128)) if quick else TOKENS
    shapes = tuple(shape for shape in SHAPES if 128 not in shape) if quick else SHAPES
    for format_name, activation in FORMATS:
        for rows, cols in shapes:
            streamed = (rows, cols) in STREAMED_SHAPES
            if format_bytes(format_name, (rows, cols)) > 2 * small:  # not in cache, so left to the fit
                continue
            pool = Pool(format_name, activation, rows, cols, larger[-1] if streamed and larger else small)
            for count in threads:
                for tokens in tokens_of:
                    if not pool.too_long(tokens, count):
                        yield pool.cached(tokens, count, small)
                if not streamed:
                    continue
                for working_set in larger[:-1]:
                    yield pool.cached(1, count, working_set)
                for tokens in STREAMED_TOKENS:
                    if not pool.too_long(tokens, count):
                        yield pool.streamed(tokens, count)


def undisturbed(seconds: Mapping[ProductKey, float]) -> dict[ProductKey, float]:
    """Times brought down to what times of the same matrix with other numbers of tokens allow.

    More tokens never take less time, and a token among more never takes more than among fewer (but a tenth: caches
    fill up). On a quiet machine nothing changes; on a noisy one a cell whose tries were all disturbed is put right.
    """
    by_matrix: dict[tuple[object, ...], list[ProductKey]] = {}
    for key in seconds:
        streamed = _walk_of(key, seconds)
        by_matrix.setdefault((key.format, key.threads, key.rows, key.cols, streamed), []).append(key)
    found = dict(seconds)
    for keys in by_matrix.values():
        keys.sort(key=lambda key: key.tokens)
        for fewer, more in pairwise(keys):
            found[more] = min(found[more], _PER_TOKEN * found[fewer] * more.tokens / fewer.tokens)
        for fewer, more in reversed(list(pairwise(keys))):
            found[fewer] = min(found[fewer], found[more])
    return found


def _walk_of(key: ProductKey, among: Iterable[ProductKey]) -> int:
    """Which walk over this matrix a cell belongs to: 0 the smallest working set with so many tokens, 1 the next, ..."""
    alike = sorted(
        other.working_set_bytes
        for other in among
        if (other.format, other.threads, other.rows, other.cols, other.tokens)
        == (key.format, key.threads, key.rows, key.cols, key.tokens)
    )
    place = alike.index(key.working_set_bytes)
    return 0 if place == 0 else (1 if place == len(alike) - 1 else 1 + place)
