"""The vocabulary of metrics: name, unit, direction, alias in limits.

Names follow the field (vLLM's `p99_itl_ms`, llama-bench's `pp512` are understood as synonyms).
How a metric is measured lives in `trilemma.measure`.
"""

from __future__ import annotations

from typing import Literal

from trilemma.core.errors import UnknownNameError
from trilemma.core.record import Record

Direction = Literal["lower", "higher"]


class Metric(Record):
    """What a number means. `direction` says which way is better; unit 'ratio' is a bare fraction."""

    name: str
    unit: str
    direction: Direction
    alias: str | None = None
    what: str


def _table(*rows: tuple[str, str, Direction, str | None, str]) -> dict[str, Metric]:
    return {
        name: Metric(name=name, unit=unit, direction=direction, alias=alias, what=what)
        for name, unit, direction, alias, what in rows
    }


METRICS: dict[str, Metric] = _table(
    ("weights_bytes", "bytes", "lower", "weights", "packed weights, scales and minima"),
    ("artifact_bytes", "bytes", "lower", "disk", "the artifact folder on disk"),
    ("engine_memory_bytes", "bytes", "lower", "memory", "weights + KV cache + scratch at the stated lengths, counted by the engine"),
    ("peak_memory_bytes", "bytes", "lower", "peak_memory", "high-water resident set of a fresh process that opens, prefills and decodes"),
    ("kv_bytes_per_token", "bytes", "lower", None, "KV cache bytes for each position"),
    ("ttft_s", "s", "lower", "ttft", "request in to first token out, at the stated prompt length"),
    ("tpot_s", "s", "lower", "tpot", "mean time per output token after the first"),
    ("itl_s", "s", "lower", "itl", "every gap between output tokens, pooled"),
    ("itl_p99_s", "s", "lower", "itl_p99", "99th percentile of the gaps between output tokens"),
    ("prefill_tokens_per_s", "tokens/s", "higher", "prefill", "prompt tokens per second, one sequence"),
    ("decode_tokens_per_s", "tokens/s", "higher", "decode", "output tokens per second, one sequence"),
    ("throughput_tokens_per_s", "tokens/s", "higher", "throughput", "output tokens per second over all sequences at the stated concurrency"),
    ("energy_j_per_output_token", "J", "lower", "energy", "gross energy per output token"),
    ("energy_j_per_total_token", "J", "lower", None, "gross energy per prompt or output token"),
    ("power_w", "W", "lower", "power", "mean power while generating"),
    ("idle_power_w", "W", "lower", None, "mean power before the work"),
    ("battery_h", "h", "higher", "battery", "hours of battery at the stated duty cycle"),
    ("perplexity", "ratio", "lower", "ppl", "per token, at the stated context and stride"),
    ("word_perplexity", "ratio", "lower", None, "per word between white space (lm-eval's definition)"),
    ("byte_perplexity", "ratio", "lower", None, "per byte of text (lm-eval's definition)"),
    ("bits_per_byte", "bits/byte", "lower", None, "cross-entropy per byte of text"),
    ("ppl_increase", "ratio", "lower", "ppl_increase", "paired relative increase of perplexity over the unmodified model"),
    ("kl_mean", "nats", "lower", "kl", "mean KL(reference || model) per token, same tokens"),
    ("kl_p99", "nats", "lower", None, "99th percentile of the per-token KL"),
    ("kl_p999", "nats", "lower", None, "99.9th percentile of the per-token KL"),
    ("top1_agreement", "ratio", "higher", "agreement", "share of tokens whose most likely next token is the reference's"),
    ("repetition_rate", "ratio", "lower", None, "share of an answer's 4-grams that occurred before in it, mean over greedy answers"),
    ("looping_rate", "ratio", "lower", None, "share of greedy answers that end in a loop of at most 8 tokens over half of the answer"),
    ("empty_rate", "ratio", "lower", None, "share of greedy answers of fewer than 3 tokens"),
    ("answer_tokens", "tokens", "higher", None, "mean length of the greedy answers"),
    ("changed_answers", "ratio", "lower", None, "share of greedy answers that differ from the reference's"),
    ("agreed_tokens", "tokens", "higher", None, "mean tokens before a greedy answer parts from the reference's"),
    ("answer_s", "s", "lower", None, "request in to the whole answer out"),
    ("energy_j_per_answer", "J", "lower", None, "gross energy of a request with its whole answer"),
    ("build_s", "s", "lower", None, "time that building the model took"),
    ("build_energy_j", "J", "lower", None, "energy that building the model took"),
)  # fmt: skip

TASK_METRICS = {
    "accuracy": "share of a task's items answered right (lm-eval's acc)",
    "accuracy_norm": "the same with log-likelihoods divided by the answer's characters (lm-eval's acc_norm)",
    "accuracy_change": "accuracy less the reference's on the same items",
}

# Those of vLLM's benchmark end in _ms: a limit's bare number is then in milliseconds.
SYNONYMS = {
    "time_to_first_token": "ttft_s", "time_per_output_token": "tpot_s", "kl_div": "kl_mean",
    "median_ttft_ms": "ttft_s", "median_tpot_ms": "tpot_s", "median_itl_ms": "itl_s", "p99_itl_ms": "itl_p99_s",
    "output_throughput": "throughput_tokens_per_s",
}  # fmt: skip
# llama-bench's names say a length too; the length of a run is its own.
_LLAMA_BENCH = {"pp": "prefill_tokens_per_s", "tg": "decode_tokens_per_s"}


def resolve_metric(name: str) -> Metric:
    """The metric of a name, an alias or a known synonym.

    `accuracy/<task>`, `accuracy_norm/<task>` and `accuracy_change/<task>` are open-ended.

    Raises:
        UnknownNameError: no such metric; the message lists names and aliases.
    """
    family, _, task = name.partition("/")
    if task and family in TASK_METRICS:
        return Metric(name=name, unit="ratio", direction="higher", alias=None, what=TASK_METRICS[family])
    if name in METRICS:
        return METRICS[name]
    for metric in METRICS.values():
        if name == metric.alias:
            return metric
    if name in SYNONYMS:
        return METRICS[SYNONYMS[name]]
    if name[:2] in _LLAMA_BENCH and name[2:].isdecimal():
        return METRICS[_LLAMA_BENCH[name[:2]]]
    aliases = [metric.alias for metric in METRICS.values() if metric.alias]
    raise UnknownNameError("metric", name, {*METRICS, *aliases})
