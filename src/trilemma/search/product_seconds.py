"""Seconds of a token's product with each matrix in each format, on this host through the engine: time for `mixed_bits`.

Products are timed on random matrices, walked over so many bytes as the whole model reads a token, so that they come
from the cache or the memory that the model's own would come from. What a step does besides is a whole step of the
model in one format, timed in the same rounds, less that model's products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trilemma.core.environment import usable_cores
from trilemma.core.errors import LimitError
from trilemma.formats import FORMATS
from trilemma.formats.random_weights import with_random_weights
from trilemma.measure.device.product_probe import Pool
from trilemma.measure.device.tries import Try, take_turns, typical
from trilemma.model.config import DecoderConfig, Experts
from trilemma.model.model import Model
from trilemma.runtime.engine import EngineOptions, SamplingSettings
from trilemma.runtime.native import NativeEngine

Cell = tuple[tuple[int, int], str]
"""Shape (out, in) and format of a matrix."""

_ROUNDS, _MOST_S = 40, 60.0
_MOST_BYTES = 256 << 20  # walked over: far more than any last cache
_TOKENS = 12
_STEP = "whole step"


@dataclass(frozen=True)
class ProductSeconds:
    """cells: shape and format -> seconds of one product; step_s, floor: a whole step, all matrices in that format."""

    config: DecoderConfig
    cells: Mapping[Cell, float]
    step_s: float
    floor: str

    def of(self, name: str, format_name: str) -> float:
        """Seconds of a token's product with a matrix; of experts, in the mean over all of them."""
        if name == "embedding.weight" and not self.config.tied:
            return 0.0  # a row is looked up
        shape = self.config.tensor_shapes()[name]
        return self.cells[(shape[0], shape[1]), format_name] * _share(self.config, name)

    def beside(self, names: Sequence[str]) -> float:
        """What a step does besides the products of these matrices."""
        return self.step_s - sum(self.of(name, self.floor) for name in names)

    def limit(self, tpot_s: float, names: Sequence[str]) -> float:
        """What products may take where a token may take `tpot_s`.

        Raises:
            LimitError: a token takes that long without any product.
        """
        beside = self.beside(names)
        if not beside < tpot_s < math.inf:  # which no number that is none passes either
            raise LimitError(
                f"A token can not take {1e3 * tpot_s:.3g} ms: without any product it takes {1e3 * beside:.3g} ms on "
                "this host. Give a number above that."
            )
        return tpot_s - beside


def time_products(
    model: Model,
    names: Sequence[str],
    formats: Sequence[str],
    floor: str,
    nbytes: float,
    *,
    threads: int | None = None,
    tell: Callable[[int, int, str], None] | None = None,
) -> ProductSeconds:
    """Of a model's matrices in each format, at one token.

    Args:
        floor: the format among them in which a whole step is timed.
        nbytes: what a step of the model reads.
    """
    count = threads or usable_cores()
    shapes = {(rows, columns) for rows, columns in (model.config.tensor_shapes()[name] for name in names)}
    fitting = [(shape, name) for shape in sorted(shapes) for name in formats if _fits(name, shape[1])]
    tries: dict[object, Try] = {}
    for shape, name in fitting:
        pool = Pool(name, "int8-g32", *shape, nbytes=int(min(nbytes, _MOST_BYTES)))
        tries[shape, name] = pool.cached(1, count, int(nbytes))[1]
    twin = with_random_weights(model, lambda name: floor if name in names else model.format_of(name))
    engine = NativeEngine(twin, EngineOptions(threads=count, max_context=2 * _TOKENS))
    wanted = SamplingSettings(max_tokens=_TOKENS, ignore_eos=True)

    def step() -> float:
        return typical([later - earlier for earlier, later in pairwise(engine.generate([1], wanted).token_times_s[1:])])

    tries[_STEP] = step
    report = tell or (lambda *_: None)
    try:
        samples = take_turns(
            tries, rounds=_ROUNDS, most_s=_MOST_S,
            progress=lambda share: report(int(100 * share), 100, "seconds of each product"),
        )  # fmt: skip
    finally:
        engine.close()
    cells = {cell: typical(samples[cell]) for cell in fitting}
    return ProductSeconds(model.config, cells, typical(samples[_STEP]), floor)


def _fits(format_name: str, columns: int) -> bool:
    supergroup = FORMATS.get(format_name).supergroup
    return supergroup is None or columns % supergroup == 0


def _share(config: DecoderConfig, name: str) -> float:
    """Of experts, how many of them a token chooses, as a share."""
    if ".experts." not in name:
        return 1.0
    ffn = config.layers[int(name.split(".")[1])].ffn
    assert isinstance(ffn, Experts)
    return ffn.active / ffn.count
