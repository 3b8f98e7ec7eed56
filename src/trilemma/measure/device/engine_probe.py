"""What the engine's steps cost beside matrix products: attention by depth, norms, activations, sampling.

Small random models are run through the engine itself. Attention is the difference between a step at one depth and at
another; the rest is a whole step less its own matrix products, timed on the same weights in the same rounds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from trilemma import _native
from trilemma.core.host_tables import AttentionTime, Overhead
from trilemma.measure.device.small_models import Shape, open_shape, random_model
from trilemma.measure.device.step_time import product_jobs
from trilemma.measure.device.tries import Try, typical
from trilemma.runtime.engine import KvCache, SamplingSettings
from trilemma.runtime.native import Step, load_weights

CHUNK = 128
"""Prompt tokens that the engine takes through a layer together, by default."""
KV_CACHES: tuple[KvCache, ...] = ("bf16", "int8", "f32")
SHALLOW, DEEP = 0, 896  # cached positions between which attention is taken; the deep step sees CHUNK more at most
_LAYERS, _KV_HEADS = 2, 2
_GROUPS = ((1, 64), (2, 64), (3, 64), (4, 64), (8, 64), (4, 32), (1, 128), (4, 128))  # query heads a KV head, width
_PROMPTED = ((2, 32), (2, 64), (2, 128))
_STEPS = 6  # decode steps of one try


@dataclass(frozen=True)
class AttentionKey:
    """One step of an attention-only model at one depth."""

    kv: KvCache
    threads: int
    tokens: int
    group: int
    head_dim: int
    depth: int


class _Depths:
    """One attention-only model with a filled cache, stepped at any depth."""

    def __init__(self, kv: KvCache, threads: int, group: int, head_dim: int) -> None:
        shape = Shape(_LAYERS, 64, heads=group * _KV_HEADS, kv_heads=_KV_HEADS, head_dim=head_dim, context=DEEP + CHUNK)
        self._engine = open_shape(shape, threads, kv)
        self._batch = self._engine.open_sequences(1)
        self._sequence = self._batch.create()
        self._tokens = np.arange(DEEP + CHUNK, dtype=np.int32) % shape.vocab

    def once(self, tokens: int, depth: int) -> float:
        batch, sequence = self._batch, self._sequence
        if batch.length(sequence) < depth:
            batch.truncate(sequence, 0)
            batch.forward([Step(sequence, self._tokens[:DEEP], "none")])
        batch.truncate(sequence, depth)
        steps = _STEPS if tokens == 1 else 1
        began = time.perf_counter()
        for _ in range(steps):
            batch.forward([Step(sequence, self._tokens[:tokens], "all")])  # else the last layer would only store keys
        return (time.perf_counter() - began) / steps


def attention_probes(threads: Iterable[int], *, quick: bool = False) -> Iterator[tuple[AttentionKey, Try]]:
    """Shallow and deep steps of every cache precision, group and width of heads."""
    for kv in KV_CACHES:
        for count in threads:
            kinds: dict[tuple[int, int], set[int]] = {}
            for kind in _GROUPS[::2] if quick else _GROUPS:
                kinds.setdefault(kind, set()).add(1)
            for kind in _PROMPTED:
                kinds.setdefault(kind, set()).add(CHUNK)
            for (group, head_dim), lengths in kinds.items():
                model = _Depths(kv, count, group, head_dim)
                for tokens in sorted(lengths):
                    for depth in (SHALLOW, DEEP):
                        key = AttentionKey(kv, count, tokens, group, head_dim, depth)
                        yield key, partial(model.once, tokens, depth)


def attention_times(timed: Mapping[AttentionKey, float]) -> tuple[AttentionTime, ...]:
    """Seconds of one more position for one key-value head, from the difference between the depths."""
    found = []
    for key, deep in timed.items():
        if key.depth != DEEP:
            continue
        shallow = timed[AttentionKey(**{**vars(key), "depth": SHALLOW})]
        more = max(deep - shallow, 1e-9) / _LAYERS / DEEP
        if key.tokens == 1:
            seconds = more / -(-_KV_HEADS // key.threads)  # heads are spread over threads, each whole
        else:
            seconds = more * min(key.threads, _KV_HEADS * 4) / (key.tokens * key.group * _KV_HEADS)
        found.append(
            AttentionTime(
                kv=key.kv, threads=key.threads, tokens=key.tokens, group=key.group, head_dim=key.head_dim,
                seconds=seconds,
            )
        )  # fmt: skip
    return tuple(found)


@dataclass(frozen=True)
class StepKey:
    """One small model and what is timed of it: a whole step, or its products alone."""

    shape: Shape
    threads: int
    tokens: int
    part: Literal["step", "products"]

    @property
    def depth(self) -> int:
        """Cached positions before the step: some of the answer, or none of a prompt."""
        return 1 + _STEPS // 2 if self.tokens == 1 else 0


_SHAPES = (
    Shape(2, 64, hidden=64),
    Shape(2, 64, hidden=64, vocab=16384),
    Shape(8, 64, hidden=64),
    Shape(8, 768, hidden=64),
    Shape(4, 64, hidden=2048),
    Shape(8, 64, heads=2, kv_heads=2),
    Shape(8, 768, heads=2, kv_heads=2),
    Shape(8, 64, heads=16, kv_heads=8),
)
TOKENS = (1, 16, CHUNK)


class _Stepped:
    """One small model: a step of so many tokens as a request makes it, and the products of that step."""

    def __init__(self, shape: Shape, threads: int) -> None:
        self._shape, self._threads = shape, threads
        self._engine = open_shape(shape, threads)
        self._weights = load_weights(random_model(shape.config(), "f32", "f32", "f32"))
        self._weights.settle(threads)
        self._settings = SamplingSettings(max_tokens=_STEPS + 2, ignore_eos=True)

    def step(self, tokens: int) -> float:
        if tokens == 1:
            stamps = self._engine.generate([1], self._settings).token_times_s
            return typical([float(gap) for gap in np.diff(stamps[1:])])
        once = SamplingSettings(max_tokens=1, ignore_eos=True)
        return [self._engine.generate([1] * tokens, once).token_times_s[0] for _ in range(2)][1]  # the first warms up

    def products(self, tokens: int) -> float:
        jobs = list(product_jobs(self._shape.config(), tokens, head=True))
        turns = 1 + _STEPS if tokens == 1 else 2
        by_count = {count: [list(job.names) for job in jobs if job.tokens == count] for count in (tokens, 1)}
        return sum(typical(self._walks(names, int(count), turns)[1:]) for count, names in by_count.items())

    def _walks(self, jobs: list[list[str]], tokens: int, passes: int) -> list[float]:
        return _native.time_products(self._weights, jobs, tokens=tokens, threads=self._threads, passes=passes)


def step_probes(threads: Iterable[int]) -> Iterator[tuple[StepKey, Try]]:
    """Whole steps of small models, and their products."""
    for count in threads:
        for shape in _SHAPES:
            model = _Stepped(shape, count)
            for tokens in TOKENS:
                yield StepKey(shape, count, tokens, "step"), partial(model.step, tokens)
                yield StepKey(shape, count, tokens, "products"), partial(model.products, tokens)


def overheads(
    seconds: Mapping[StepKey, float], attention_s: Mapping[tuple[Shape, int, int], float]
) -> tuple[Overhead, ...]:
    """What is left of steps, as non-negative costs of what a step has many of (least squares of relative errors).

    Args:
        seconds: of steps and of their products.
        attention_s: (shape, threads, tokens) -> predicted seconds of a step's attention.
    """
    from scipy.optimize import nnls

    kinds = sorted({(key.threads, key.tokens) for key in seconds})
    found = []
    for threads, tokens in kinds:
        rows, left = [], []
        for key, whole in seconds.items():
            if key.part != "step" or (key.threads, key.tokens) != (threads, tokens):
                continue
            products = seconds[StepKey(key.shape, threads, tokens, "products")]
            rest = max(whole - products - attention_s.get((key.shape, threads, tokens), 0.0), 0.0)
            rows.append(np.asarray(_features(key.shape, tokens)) / whole)
            left.append(rest / whole)
        scale = np.abs(rows).max(axis=0)
        scale[scale == 0] = 1.0
        costs = nnls(np.asarray(rows) / scale, np.asarray(left))[0] / scale
        names = ("step_s", "vocab_s", "block_s", "dim_s", "hidden_s", "heads_s")
        found.append(Overhead(threads=threads, tokens=tokens, **dict(zip(names, map(float, costs), strict=True))))
    return tuple(found)


def _features(shape: Shape, tokens: int) -> tuple[float, ...]:
    """As `StepTimes.overhead` counts them: after its keys, the last layer sees one token of a prompt."""
    through = shape.layers - 1 + 1 / tokens
    blocks = shape.layers * bool(shape.heads) + through * bool(shape.hidden)
    heads = (through * shape.heads + shape.layers * 2 * shape.kv_heads) * shape.head_dim
    return (1.0, shape.vocab, blocks, blocks * shape.dim, through * shape.hidden, heads)
