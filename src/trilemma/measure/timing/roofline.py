"""Beside each rate, its share of what this machine could do: decode of the read bandwidth, prefill of the arithmetic.

The ceiling of a prefill is weighted: each matrix at the best rate of the native kernels in its own format and
input precision, attention at the rate of f32, so that a model of mixed formats is held against what its mixture
could reach. Other runtimes are held against the same ceilings. Probed in the run that they stand beside; one
that a measured rate exceeds was disturbed and is probed again, and the best counts. Left out: norms, softmax
and sampling, which neither ceiling counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from trilemma.core.errors import TrilemmaError
from trilemma.core.measurement import Measurement
from trilemma.formats.pack import format_bytes
from trilemma.measure.device.ceilings import Bandwidth, read_bandwidth, roofline_share
from trilemma.measure.device.compute_ceiling import compute_rate
from trilemma.model.cost import (
    attention_macs_per_token,
    decode_bytes_per_token,
    expert_shares,
    kv_bytes,
    prompt_macs,
    prompt_rows,
)
from trilemma.model.model import Activation, Model

Product = tuple[str, Activation]  # format of the weights, precision of the inputs
ATTENTION: Product = ("f32", "f32")
AGAIN = 2  # times that an exceeded ceiling is probed again


class ComputeCeiling(NamedTuple):
    """Multiply-accumulates of a prompt, and the most a second that its mixture of products allows."""

    macs: int
    macs_per_s: float

    def share(self, ttft_s: float) -> float:
        """Share of the ceiling that a prefill of this many seconds used."""
        return self.macs / ttft_s / self.macs_per_s


class Ceilings:
    """What this machine was seen to read and to multiply, the best of a run's probes."""

    def __init__(self) -> None:
        self._read: dict[tuple[int, int], Bandwidth] = {}
        self._rates: dict[tuple[Product, int], float] = {}

    def bandwidth(self, threads: int, working_set_bytes: int, reached: float = 0.0) -> Bandwidth:
        """Best read rate over a working set of this size, or of one within 5% that was probed already.

        Args:
            reached: bytes a second that were measured; a lower ceiling is probed again.
        """
        near = (key for key in self._read if key[0] == threads and abs(key[1] - working_set_bytes) <= 0.05 * key[1])
        key = next(near, (threads, working_set_bytes))
        if key not in self._read:
            self._read[key] = read_bandwidth(*key)
        for _ in range(AGAIN):
            if self._read[key].bytes_per_s >= reached:
                break
            self._read[key] = max(self._read[key], read_bandwidth(*key), key=lambda found: found.bytes_per_s)
        return self._read[key]

    def rate(self, product: Product, threads: int, *, again: bool = False) -> float:
        """Best multiply-accumulates a second of the native kernels."""
        key = (product, threads)
        if again or key not in self._rates:
            self._rates[key] = max(compute_rate(*product, threads).macs_per_s, self._rates.get(key, 0.0))
        return self._rates[key]

    def compute(self, model: Model, prompt_tokens: int, threads: int, ttft_s: float) -> ComputeCeiling | None:
        """The ceiling of this model's prefill, which took `ttft_s`; None where a product has no native kernel."""
        macs = prompt_products(model, prompt_tokens)
        try:
            found = weighted_ceiling(macs, lambda product: self.rate(product, threads))
            for _ in range(AGAIN):
                if found.share(ttft_s) <= 1:
                    break
                found = weighted_ceiling(macs, lambda product: self.rate(product, threads, again=True))
        except TrilemmaError:
            return None
        return found

    def notes(self) -> list[str]:
        """One line for each ceiling that was probed."""
        reads = [
            f"read bandwidth {b.bytes_per_s / 1e9:.1f} GB/s over {b.working_set_bytes / 1e6:.0f} MB, "
            f"{_threads(b.threads)}"
            for b in self._read.values()
        ]
        rates = [
            f"arithmetic {rate / 1e9:.1f} G products/s of {weights} weights with {inputs} inputs, {_threads(threads)}"
            for ((weights, inputs), threads), rate in self._rates.items()
        ]
        return reads + rates


def weighted_ceiling(macs: Mapping[Product, int], rate: Callable[[Product], float]) -> ComputeCeiling:
    """All products over the least time that they need one kind after the other."""
    total = sum(macs.values())
    return ComputeCeiling(total, total / sum(count / rate(product) for product, count in macs.items()))


def prompt_products(model: Model, tokens: int) -> dict[Product, int]:
    """Multiply-accumulates of a prefill by kind of product; their sum is `prompt_macs`.

    Of experts, the share that is active counts.
    """
    config = model.config
    matrices = 0
    shapes = config.tensor_shapes()
    shares = expert_shares(config)
    found: dict[Product, int] = {}

    def add(product: Product, macs: int) -> None:
        found[product] = found.get(product, 0) + macs

    for name in config.linear_names():
        size = shapes[name][0] * shapes[name][1]
        macs = prompt_rows(config, name, tokens) * int(size * shares.get(name, 1))
        matrices += macs
        add(_product(model, name), macs)
    head = config.vocab_size * config.dim
    add(_product(model, "embedding.weight" if config.tied else "head.weight"), head)
    add(ATTENTION, prompt_macs(config, tokens) - matrices - head)
    return {product: macs for product, macs in found.items() if macs}


def step_products(model: Model, batch: int, context: int) -> dict[Product, int]:
    """Multiply-accumulates of one decode step of `batch` sequences at a context length, by kind of product."""
    found = {product: batch * macs for product, macs in prompt_products(model, 1).items()}
    seen = attention_macs_per_token(model.config, context) - attention_macs_per_token(model.config, 1)
    return {**found, ATTENTION: found.get(ATTENTION, 0) + batch * seen} if seen else found


def step_share(
    model: Model, kv_cache: str, batch: int, context: int, threads: int, step_s: float, ceilings: Ceilings
) -> dict[str, str | float]:
    """Share of the nearer ceiling that a decode step of `batch` sequences used, and which one that is.

    Weights are read once a step, of experts those of one token; every sequence reads its own cache.

    Returns:
        Conditions `roofline_share` and `bound_by` ('memory' or 'arithmetic'); nothing without a cache, whose steps
        are prefills, or where a product has no native kernel.
    """
    if kv_cache == "none":
        return {}
    read = decode_bytes(model, kv_cache, context) + (batch - 1) * kv_bytes(model.config, kv_cache, context)
    macs = step_products(model, batch, context)
    try:
        arithmetic_s = sum(count / ceilings.rate(product, threads) for product, count in macs.items())
    except TrilemmaError:
        return {}
    memory_s = read / ceilings.bandwidth(threads, read, read / step_s).bytes_per_s
    bound = "memory" if memory_s >= arithmetic_s else "arithmetic"
    return {"roofline_share": max(memory_s, arithmetic_s) / step_s, "bound_by": bound}


def _product(model: Model, name: str) -> Product:
    return model.format_of(name), model.linear(name).activation


def decode_bytes(model: Model, kv_cache: str, context: int) -> int:
    """Bytes that one decode step reads at a context length: matrices, one embedding row, the cache."""
    return decode_bytes_per_token(model.config, model.format_of, kv_cache, context, format_bytes)


def with_shares(
    found: Mapping[str, Measurement], model: Model, kv_cache: str, context: int, threads: int, ceilings: Ceilings
) -> dict[str, Measurement]:
    """Speed figures with the ceilings and their shares of them in the conditions.

    Args:
        found: tpot_s, decode_tokens_per_s, ttft_s and prefill_tokens_per_s, measured.
        context: at which the cache is read.
    """
    read = decode_bytes(model, kv_cache, context)
    decode = found["decode_tokens_per_s"].value or 0.0
    most = ceilings.bandwidth(threads, read, read * decode)
    stated: dict[str, float] = {
        "decode_bytes_per_token": read,
        "read_bandwidth_bytes_per_s": most.bytes_per_s,
        "roofline_share": roofline_share(read, decode, most),
    }
    extra = {"tpot_s": stated, "decode_tokens_per_s": stated}
    ttft = found["ttft_s"]
    ceiling = None
    if ttft.value:
        ceiling = ceilings.compute(model, int(ttft.conditions["prompt_tokens"]), threads, ttft.value)
    if ttft.value and ceiling is not None:
        extra["ttft_s"] = extra["prefill_tokens_per_s"] = {
            "prefill_macs": ceiling.macs, "compute_ceiling_macs_per_s": ceiling.macs_per_s,
            "compute_share": ceiling.share(ttft.value),
        }  # fmt: skip
    return {
        metric: one.model_copy(update={"conditions": {**one.conditions, **extra.get(metric, {})}})
        for metric, one in found.items()
    }


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


__all__ = [
    "ATTENTION", "Ceilings", "ComputeCeiling", "decode_bytes", "prompt_products", "step_products", "step_share",
    "weighted_ceiling", "with_shares",
]  # fmt: skip
