"""The arithmetic ceiling beside which a prefill stands: multiply-accumulates a second of the native kernels.

One feed-forward block whose weights fit in cache is given many tokens at once, in the format and
input precision of the model in question: nothing is left but arithmetic. The best of several widths
counts. Left out: what the processor could do with other kernels.
"""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

from trilemma.formats.random_weights import with_random_weights
from trilemma.model.config import DecoderConfig, Dense, LayerSpec
from trilemma.model.model import Activation, Model
from trilemma.model.sources import RandomSource
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions

Isa = Literal["scalar", "avx2", "avxvnni", "avx512"]
_WIDTHS = ((256, 768), (512, 1536))
_TOKENS = 256
_LEAST_S = 0.15


class ComputeRate(NamedTuple):
    """Multiply-accumulates per second, in which format and input precision, on how many threads."""

    macs_per_s: float
    format: str
    activation: str
    threads: int


def compute_rate(format_name: str, activation: Activation, threads: int = 1, isa: Isa | None = None) -> ComputeRate:
    """Best rate of the native kernels for matrices of this format with inputs of this precision.

    Args:
        isa: instruction set; the fastest by default.
    """
    best = max(_rate(dim, hidden, format_name, activation, threads, isa) for dim, hidden in _WIDTHS)
    return ComputeRate(best, format_name, activation, threads)


def _rate(dim: int, hidden: int, format_name: str, activation: Activation, threads: int, isa: Isa | None) -> float:
    layer = LayerSpec(attention=None, ffn=Dense(hidden=hidden))
    config = DecoderConfig(
        family="llama", dim=dim, vocab_size=64, max_context=_TOKENS, layers=(layer,) * 2, norm_eps=1e-5, tied=True
    )
    model = Model(config, RandomSource(config))
    twin = with_random_weights(model, lambda name: format_name, activation_of=lambda name: activation)
    engine = open_engine(twin, options=EngineOptions(threads=threads, isa=isa))
    macs = _TOKENS * (len(config.layers) * 3 * dim * hidden + config.vocab_size * dim)
    tokens = [index % 64 for index in range(_TOKENS)]
    try:
        engine.logits(tokens)
        times: list[float] = []
        while len(times) < 5 or sum(times) < _LEAST_S:
            began = time.perf_counter()
            engine.logits(tokens)  # of all: else the last layer would see one token
            times.append(time.perf_counter() - began)
        return macs / min(times)
    finally:
        engine.close()
