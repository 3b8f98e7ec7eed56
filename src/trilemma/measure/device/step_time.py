"""Time per token and to the first token of a model on a profiled host: a sum over what its step really does.

    step = sum of products by format and shape + attention by depth + halves of layers + sampling

Products of the same input count as one, as the engine runs them. Of experts, only those that the tokens choose.
Whether weights are in cache or come from memory is decided by what the whole step reads. Left out: several requests at
once, and other programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trilemma.core.device import Device
from trilemma.core.errors import InputError
from trilemma.core.host_tables import AttentionTime, HostTables, Overhead, Quantity
from trilemma.core.record import Record
from trilemma.formats.pack import format_bytes
from trilemma.measure.device.device_model import Times
from trilemma.measure.device.product_time import ProductTimes, between, fit_positive
from trilemma.model.config import Attention, DecoderConfig, Dense, Experts, LayerSpec
from trilemma.model.cost import decode_bytes_per_token, kv_bytes, weights_bytes
from trilemma.model.model import Activation, Model

_SERIAL_WORK = 16e3  # positions x query width below which the engine leaves attention to one thread


class StepTime(Record):
    """Seconds of one step, by what they go to; `streamed`: of the products, waiting for memory rather than cache."""

    products_s: float
    streamed_s: float
    attention_s: float
    overhead_s: float

    @property
    def seconds(self) -> float:
        return self.products_s + self.attention_s + self.overhead_s

    @property
    def bound(self) -> str:
        """What it mostly waits for: 'memory' (weights that come from there), 'compute' or 'overhead'."""
        parts = {
            "memory": self.streamed_s,
            "compute": self.products_s - self.streamed_s + self.attention_s,
            "overhead": self.overhead_s,
        }
        return max(parts, key=lambda part: parts[part])


class Prediction(Record):
    """A request on a profiled host. errors: median and 90th percentile of the profile's own check cases, or None."""

    tpot_s: float
    ttft_s: float
    decode: StepTime
    prefill: StepTime
    working_set_bytes: float
    tpot_error: tuple[float, float] | None
    ttft_error: tuple[float, float] | None
    stand_ins: dict[str, str]


@dataclass(frozen=True)
class Form:
    """A model by arithmetic: shapes, format and input precision of every matrix, and the cache's precision."""

    config: DecoderConfig
    format_of: Callable[[str], str]
    activation_of: Callable[[str], Activation]
    kv: str


def predict(
    device: Device,
    model: Model,
    *,
    prompt_tokens: int,
    output_tokens: int,
    kv: str | None = None,
    threads: int | None = None,
) -> Prediction:
    """Time per output token and to the first token of a model in its own form.

    Args:
        kv: precision of the cache; the model's own by default. threads: the profile's most by default.

    Raises:
        InputError: a profile without kernel times, or threads that it does not hold.
    """
    return StepTimes(device, threads).predict(form_of(model, kv), prompt_tokens, output_tokens)


def form_of(model: Model, kv: str | None = None) -> Form:
    """A model as it is."""
    return Form(model.config, model.format_of, lambda n: model.linear(n).activation, kv or model.run.kv_cache)


class StepTimes:
    """The predictor of one profile and number of threads.

    Raises:
        InputError: a profile without kernel times, or threads that it does not hold.
    """

    def __init__(self, device: Device, threads: int | None = None) -> None:
        if device.host is None:
            raise InputError(
                f"The device profile '{device.name}' has no kernel times. Make one there with `trilemma profile`."
            )
        self.device = device
        self.tables: HostTables = device.host
        self.threads = threads or self.tables.threads[-1]
        if self.threads not in self.tables.threads:
            known = ", ".join(map(str, self.tables.threads))
            raise InputError(
                f"The device profile '{device.name}' was taken with {known} threads, not {self.threads}. "
                "Ask for one of these, or make another profile with `trilemma profile --threads`."
            )
        self.products = ProductTimes(self.tables, format_bytes)

    def times(self, form: Form, prompt_tokens: int, output_tokens: int) -> Times:
        """The same for a forecast: the interval is the 90th percentile of the profile's own check cases."""
        found = self.predict(form, prompt_tokens, output_tokens)
        stands = "".join(f"; {there} stands for {asked}" for asked, there in found.stand_ins.items())
        return Times(
            tpot_s=found.tpot_s, ttft_s=found.ttft_s, bound=found.decode.bound, prefill_bound=found.prefill.bound,
            decode_factor=self.device.decode_factor.value, prefill_factor=self.device.prefill_factor.value,
            method=f"kernel times of the profile '{self.device.name}' on {self.threads} threads{stands}; the interval "
            "is the 90th percentile of the error of its check cases",
        )  # fmt: skip

    def predict(self, form: Form, prompt_tokens: int, output_tokens: int) -> Prediction:
        """Of a request: decode at the middle of the answer, prefill in the engine's chunks."""
        if form.kv == "none":
            raise InputError("A profile predicts steps with a cache; 'none' computes everything again. Choose another.")
        middle = prompt_tokens + output_tokens // 2
        working_set = float(decode_bytes_per_token(form.config, form.format_of, form.kv, middle, format_bytes))
        decode = self.step(form, 1, middle, working_set, head=True)
        resident = float(weights_bytes(form.config, form.format_of, format_bytes))
        resident += kv_bytes(form.config, form.kv, prompt_tokens)
        starts = range(0, prompt_tokens, self.tables.chunk)
        chunks = [
            self.step(form, min(self.tables.chunk, prompt_tokens - at), at, resident, head=at == starts[-1])
            for at in starts
        ]
        prefill = StepTime(**{name: sum(getattr(c, name) for c in chunks) for name in StepTime.model_fields})
        return Prediction(
            tpot_s=decode.seconds, ttft_s=prefill.seconds, decode=decode, prefill=prefill,
            working_set_bytes=working_set, tpot_error=_errors(self.tables, "tpot_s"),
            ttft_error=_errors(self.tables, "ttft_s"), stand_ins=self._stand_ins(form),
        )  # fmt: skip

    def step(self, form: Form, tokens: int, depth: int, working_set: float, *, head: bool) -> StepTime:
        """Seconds of `tokens` new tokens behind `depth` cached ones."""
        cached = streamed = 0.0
        for job in product_jobs(form.config, tokens, head):
            near, far = (self._job(form, job, size) for size in (1.0, working_set))
            cached += near
            streamed += far - near
        attention = step_attention_s(self.tables.attention, form.config, form.kv, tokens, depth, self.threads, head)
        if tokens == 1:  # a prompt's tokens share what they read
            nbytes = float(kv_bytes(form.config, form.kv, depth))
            attention += self.products.streamed_s(nbytes, self.threads, working_set)
        overhead = self.overhead(form.config, tokens, head)
        return StepTime(
            products_s=cached + streamed, streamed_s=streamed, attention_s=attention, overhead_s=overhead
        )  # fmt: skip

    def _job(self, form: Form, job: Job, working_set: float) -> float:
        shapes = form.config.tensor_shapes()
        merged: dict[tuple[str, str, int], int] = {}
        for name in job.names:
            kind = (form.format_of(name), form.activation_of(name), shapes[name][1])
            merged[kind] = merged.get(kind, 0) + shapes[name][0]
        return job.times * sum(
            self.products.seconds(
                format_name, activation, rows, cols, tokens=job.tokens, threads=self.threads, working_set=working_set
            )
            for (format_name, activation, cols), rows in merged.items()
        )

    def overhead(self, config: DecoderConfig, tokens: int, head: bool) -> float:
        """Seconds of norms, activations, rotations, cache writes, embedding and sampling."""
        rows = sorted((r for r in self.tables.overheads if r.threads == self.threads), key=lambda r: r.tokens)
        return max(0.0, between([r.tokens for r in rows], [_overhead(r, config, head) for r in rows], tokens))

    def _stand_ins(self, form: Form) -> dict[str, str]:
        found = {}
        for name in form.config.product_names():
            asked = (form.format_of(name), form.activation_of(name))
            taken = self.products.stand_in(*asked)
            if taken != asked:
                found[" x ".join(asked)] = " x ".join(taken)
        return found


@dataclass(frozen=True)
class Job:
    """Matrices that multiply one input, for so many tokens, so many times a step."""

    names: tuple[str, ...]
    tokens: float
    times: float = 1.0


def product_jobs(config: DecoderConfig, tokens: int, head: bool) -> Iterator[Job]:
    """The matrix products of a step of so many tokens; with `head` the last one's logits are asked for, else none.

    The last layer makes keys and values of all tokens, and the rest for those whose logits are asked for.
    """
    for index, layer in enumerate(config.layers):
        asked = tokens if index + 1 < len(config.layers) else int(head)
        yield from _layer_jobs(f"layers.{index}.", layer, tokens, asked)
    if head:
        yield Job(("embedding.weight" if config.tied else "head.weight",), 1)


def _layer_jobs(at: str, layer: LayerSpec, tokens: int, asked: int) -> Iterator[Job]:
    if layer.attention is not None and asked == tokens:
        yield Job(tuple(f"{at}attention.{role}.weight" for role in "qkv"), tokens)
    elif layer.attention is not None:
        yield Job(tuple(f"{at}attention.{role}.weight" for role in "kv"), tokens)
        if asked:
            yield Job((f"{at}attention.q.weight",), asked)
    if not asked:
        return
    if layer.attention is not None:
        yield Job((f"{at}attention.o.weight",), asked)
    if isinstance(layer.ffn, Dense):
        yield from _dense_jobs(f"{at}ffn.", layer.ffn.gated, asked)
    elif layer.ffn is not None:
        yield from _expert_jobs(f"{at}ffn.", layer.ffn, asked)


def _dense_jobs(at: str, gated: bool, tokens: float, times: float = 1.0) -> Iterator[Job]:
    yield Job(tuple(f"{at}{role}.weight" for role in (("gate", "up") if gated else ("up",))), tokens, times)
    yield Job((f"{at}down.weight",), tokens, times)


def _expert_jobs(at: str, spec: Experts, tokens: int) -> Iterator[Job]:
    """Each token chooses `active` of `count`: that many experts run on one token, nearly all of them on many."""
    yield Job((f"{at}router.weight",), tokens)
    if spec.shared_hidden:
        yield from _dense_jobs(f"{at}shared.", True, tokens)
    chosen = spec.count * (1 - (1 - spec.active / spec.count) ** tokens)
    yield from _dense_jobs(f"{at}experts.0.", True, max(1.0, tokens * spec.active / chosen), chosen)


def step_attention_s(
    timed: tuple[AttentionTime, ...], config: DecoderConfig, kv: str, tokens: int, depth: int, threads: int, head: bool
) -> float:
    """Seconds of all layers' attention of `tokens` new positions; in the last one only those ask whose logits are asked
    for: with `head` the last one, else none."""
    *earlier, last = (layer.attention for layer in config.layers)
    total = sum(attention_seconds(timed, spec, kv, tokens, depth, threads) for spec in earlier if spec is not None)
    if last is not None and head:
        total += attention_seconds(timed, last, kv, 1, depth + tokens - 1, threads)
    return total


def attention_seconds(
    timed: tuple[AttentionTime, ...], spec: Attention, kv: str, tokens: int, depth: int, threads: int
) -> float:
    """Seconds of one layer's attention of `tokens` new positions behind `depth` cached ones."""
    if tokens == 1:
        seen = depth if spec.window is None else min(depth, spec.window)
        used = 1 if seen * spec.heads * spec.head_dim < _SERIAL_WORK else threads
        costs = _attention_costs(timed, kv, threads, False)
        return -(-spec.kv_heads // used) * seen * _dot(costs, spec.heads // spec.kv_heads, spec.head_dim)
    pairs = sum(min(depth + i + 1, spec.window or depth + i + 1) for i in range(tokens))
    used = min(threads, spec.kv_heads * -(-tokens * (spec.heads // spec.kv_heads) // 32))
    return pairs * spec.heads * _dot(_attention_costs(timed, kv, threads, True), 1, spec.head_dim) / used


@lru_cache(maxsize=64)
def _attention_costs(timed: tuple[AttentionTime, ...], kv: str, threads: int, prompt: bool) -> tuple[float, ...]:
    measured = "int8" if kv == "int4" else kv  # the same products over half the bytes: no slower
    rows = [row for row in timed if (row.kv, row.threads, row.tokens > 1) == (measured, threads, prompt)]
    if not rows:
        raise InputError(f"The device profile has no attention times of a cache in '{kv}' on {threads} threads.")
    features = [_attention_features(1 if prompt else row.group, row.head_dim) for row in rows]
    return tuple(fit_positive(features, [row.seconds for row in rows]))


def _attention_features(group: int, head_dim: int) -> tuple[float, float, float, float]:
    return (1.0, float(group), float(head_dim), float(group * head_dim))


def _dot(costs: Sequence[float], group: int, head_dim: int) -> float:
    return sum(cost * value for cost, value in zip(costs, _attention_features(group, head_dim), strict=True))


def _overhead(row: Overhead, config: DecoderConfig, head: bool) -> float:
    total = row.step_s + row.vocab_s * config.vocab_size if head else 0.0
    for index, layer in enumerate(config.layers):
        # of the tokens, those that go on from the last layer's keys
        asked = 1.0 if index + 1 < len(config.layers) else int(head) / row.tokens
        if layer.attention is not None:
            spec = layer.attention
            heads = (asked * spec.heads + 2 * spec.kv_heads) * spec.head_dim
            total += row.block_s + row.dim_s * config.dim + row.heads_s * heads
        if layer.ffn is not None:
            hidden = layer.ffn.hidden
            if isinstance(layer.ffn, Experts):
                hidden = hidden * layer.ffn.active + layer.ffn.shared_hidden
            total += asked * (row.block_s + row.dim_s * config.dim + row.hidden_s * hidden)
    return total


def _errors(tables: HostTables, quantity: Quantity) -> tuple[float, float] | None:
    found = tables.errors(quantity)
    if not found:
        return None
    return float(np.median(found)), float(np.quantile(found, 0.9))
