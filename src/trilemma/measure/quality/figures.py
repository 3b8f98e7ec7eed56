"""How good a model is: perplexity, bits per byte, and paired divergence from its reference.

Reference and candidate see the same tokens; every interval is over documents (over windows in llama.cpp's
protocol, whose windows know no documents). Which tokens are scored is the token set's affair. Left out: tasks
(`tasks/`), and the generation check (`generation.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import DataError, EngineError
from trilemma.core.measurement import Measurement
from trilemma.data.windows import TokenSet
from trilemma.measure.quality.reference_store import Progress, Reference, RowPool, require_finite, window_logits
from trilemma.measure.quality.token_scores import PackedLogProbs, kl_divergence, log_normalizer, token_nll
from trilemma.measure.stats import Interval, quantile_interval, ratio_interval, share_interval
from trilemma.runtime.engine import Engine

Float64 = NDArray[np.float64]

__all__ = [
    "Reference",
    "TokenScores",
    "evaluate",
    "likelihood",
    "perplexity_of",
    "score",
    "summarize",
    "token_documents",
    "token_likelihood",
]

_INTERVAL = "95% interval over"


@dataclass(frozen=True)
class TokenScores:
    """One candidate's figures for every predicted token, in the order of the token set.

    nll: (rows,) nats; kl: (rows,) nats against the reference; agrees: (rows,) same most likely token.
    """

    nll: Float64
    kl: Float64
    agrees: NDArray[np.bool_]

    def rows(self, chosen: NDArray[np.bool_]) -> TokenScores:
        return TokenScores(self.nll[chosen], self.kl[chosen], self.agrees[chosen])


def perplexity_of(engine: Engine, token_set: TokenSet, progress: Progress | None = None) -> dict[str, Measurement]:
    """Perplexity a token, a word and a byte, and bits per byte, without a reference.

    Raises:
        EngineError: logits that are not finite, or windows longer than the engine's context.
    """
    return likelihood(token_likelihood(engine, token_set, progress), token_set)


def token_likelihood(engine: Engine, token_set: TokenSet, progress: Progress | None = None) -> Float64:
    """Negative log-likelihood of every predicted token in nats, (rows,). Raises as `perplexity_of`."""
    parts = []
    with RowPool(engine.threads) as pool:
        for index in range(len(token_set.windows)):
            logits = window_logits(engine, token_set, index)
            normalizer = np.empty(len(logits), np.float64)

            def work(rows: slice, logits: NDArray[np.float32] = logits, normalizer: Float64 = normalizer) -> None:
                normalizer[rows] = log_normalizer(logits[rows])

            pool.map(work, len(logits))
            require_finite(normalizer, index, engine)
            parts.append(token_nll(logits, token_set.targets(index), normalizer))
            _tell(progress, index, token_set, "perplexity")
    return np.concatenate(parts)


def evaluate(
    engine: Engine, reference: Reference, token_set: TokenSet | None = None, progress: Progress | None = None
) -> dict[str, Measurement]:
    """Perplexity, bits per byte, and what changed against the reference on the same tokens.

    Returns:
        metric -> Measurement: what `perplexity_of` gives, ppl_increase, kl_mean, kl_p99, kl_p999, top1_agreement.

    Raises:
        DataError: `token_set` is not the one that the reference saw.
        EngineError: logits that are not finite or of another vocabulary.
    """
    if token_set is not None and token_set.hash not in (reference.asked_hash, reference.token_set.hash):
        raise DataError(
            f"The reference was made on other tokens (hash {reference.token_set.hash}, not {token_set.hash}). "
            "Build a reference on this token set."
        )
    scores = score(engine, reference, progress)
    return summarize(scores, reference.token_set, reference.nll, reference.engine_name)


def score(engine: Engine, reference: Reference, progress: Progress | None = None) -> TokenScores:
    """Per-token figures of a candidate; `summarize` turns them into measurements."""
    tokens = reference.token_set
    rows_total = tokens.predicted_tokens
    nll, kl = np.empty(rows_total, np.float64), np.empty(rows_total, np.float64)
    agrees = np.empty(rows_total, np.bool_)
    with RowPool(engine.threads) as pool:
        for index in range(len(tokens.windows)):
            logits = window_logits(engine, tokens, index)
            if logits.shape[1] != reference.vocab_size:
                raise EngineError(
                    f"The candidate has {logits.shape[1]} logits a token, the reference {reference.vocab_size}; "
                    "divergence needs the same vocabulary."
                )
            start = int(reference.starts[index])
            packed = reference.window(index)
            normalizer = np.empty(len(logits), np.float64)
            chosen = tokens.targets(index)

            def work(
                rows: slice,
                logits: NDArray[np.float32] = logits,
                normalizer: Float64 = normalizer,
                packed: PackedLogProbs = packed,
                start: int = start,
                targets: NDArray[np.int32] = chosen,
            ) -> None:
                here = slice(start + rows.start, start + rows.stop)
                normalizer[rows] = log_normalizer(logits[rows])
                nll[here] = token_nll(logits[rows], targets[rows], normalizer[rows])
                kl[here] = kl_divergence(packed.rows(rows), logits[rows], normalizer[rows])
                agrees[here] = logits[rows].argmax(axis=1) == reference.best[here]

            pool.map(work, len(logits))
            require_finite(normalizer, index, engine)
            _tell(progress, index, tokens, "quality")
    if not np.isfinite(kl).all():
        raise EngineError("A logit is minus infinity where the reference gives probability: KL is infinite.")
    return TokenScores(nll, kl, agrees)


def summarize(
    scores: TokenScores, tokens: TokenSet, reference_nll: Float64, reference_name: str
) -> dict[str, Measurement]:
    """Measurements with intervals over documents from per-token figures of the candidate and its reference."""
    owners = token_documents(tokens)
    counts = per_document(np.ones(len(owners)), tokens)
    base_ppl = math.exp(float(reference_nll.mean()))
    paired = ratio_interval(per_document(scores.nll - reference_nll, tokens), counts)
    kl = ratio_interval(per_document(scores.kl, tokens), counts, scale="log")
    agreement = share_interval(per_document(scores.agrees.astype(np.float64), tokens), counts)
    versus = f"against {reference_name} f32 on the same tokens; {_interval(tokens)}"
    found = likelihood(scores.nll, tokens)
    found["ppl_increase"] = _measure(
        "ppl_increase",
        _map(paired, _expm1),
        tokens,
        f"paired, {versus}",
        reference_perplexity=base_ppl,
    )
    found["kl_mean"] = _measure("kl_mean", kl, tokens, f"KL(reference || model), {versus}")
    for name, q in (("kl_p99", 0.99), ("kl_p999", 0.999)):
        quantile = quantile_interval(scores.kl, owners, q)
        found[name] = _measure(name, quantile, tokens, f"quantile over tokens, Woodruff interval, {versus}")
    found["top1_agreement"] = _measure("top1_agreement", agreement, tokens, versus)
    return found


def token_documents(token_set: TokenSet) -> NDArray[np.int64]:
    """The document of every scored token, (rows,)."""
    return np.repeat(token_set.documents, token_set.predicted)


def per_document(values: NDArray[np.floating], token_set: TokenSet) -> Float64:
    """Sums of token figures over documents, (documents,)."""
    sums = np.bincount(token_documents(token_set), weights=values, minlength=token_set.document_count)
    return sums.astype(np.float64)


def likelihood(nll: Float64, token_set: TokenSet) -> dict[str, Measurement]:
    """Perplexity a token, a word and a byte, and bits per byte, from per-token figures.

    Words and bytes as lm-eval's word_perplexity, byte_perplexity and bits_per_byte count them: pieces between runs
    of white space, and bytes of UTF-8.
    """
    sums = per_document(nll, token_set)
    counts = per_document(np.ones(len(nll)), token_set)
    how = _interval(token_set)
    text_bytes = _of_windows(token_set.text_bytes, token_set)
    nats = ratio_interval(sums, counts, scale="log")
    bits = ratio_interval(*_pooled(sums / math.log(2), text_bytes), scale="log")
    amount = {"text_bytes": float(text_bytes.sum())}
    found = {
        "perplexity": _measure("perplexity", _map(nats, _exp), token_set, f"exp of mean nats a token; {how}"),
        "bits_per_byte": _measure("bits_per_byte", bits, token_set, how, **amount),
        "byte_perplexity": _measure(
            "byte_perplexity", _map(bits, _exp2), token_set, f"2 to the bits a byte; {how}", **amount
        ),
    }
    if token_set.text_words is not None:
        found["word_perplexity"] = _by_word(sums, _of_windows(token_set.text_words, token_set), token_set)
    return found


def _by_word(sums: Float64, words: Float64, token_set: TokenSet) -> Measurement:
    if words.sum() < len(words):
        return Measurement.unavailable("word_perplexity", "the text has hardly any words set apart by white space")
    nats = ratio_interval(*_pooled(sums, words), scale="log")
    method = f"exp of mean nats a word between white space; {_interval(token_set)}"
    return _measure("word_perplexity", _map(nats, _exp), token_set, method, text_words=float(words.sum()))


def _pooled(sums: Float64, amounts: Float64) -> tuple[Float64, Float64]:
    """Documents whose scored text holds no whole word or byte count with the one before them."""
    groups = np.maximum(np.cumsum(amounts > 0) - 1, 0)
    pooled = [np.bincount(groups, weights=values).astype(np.float64) for values in (sums, amounts)]
    return pooled[0], pooled[1]


def _of_windows(values: NDArray[np.floating], token_set: TokenSet) -> Float64:
    """Sums of window figures over documents, (documents,)."""
    sums = np.bincount(token_set.documents, weights=values, minlength=token_set.document_count)
    return sums.astype(np.float64)


def _interval(token_set: TokenSet) -> str:
    return f"{_INTERVAL} {'windows' if token_set.protocol == 'llama.cpp' else 'documents'}"


def _measure(
    metric: str, found: Interval, token_set: TokenSet, method: str, **conditions: str | int | float
) -> Measurement:
    return Measurement.of(
        metric,
        found.value,
        method=method,
        ci95=found.ci95,
        n=token_set.document_count,
        conditions={
            "context": token_set.context,
            "stride": token_set.stride or token_set.context,
            "protocol": token_set.protocol,
            "documents": token_set.document_count,
            "tokens": token_set.predicted_tokens,
            "token_set": token_set.hash,
            **conditions,
        },
    )


def _map(interval: Interval, function: Callable[[float], float]) -> Interval:
    low, high = interval.low, interval.high
    return Interval(
        function(interval.value), None if low is None else function(low), None if high is None else function(high)
    )


def _expm1(value: float) -> float:
    return math.expm1(min(value, 700.0))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _exp2(value: float) -> float:
    return math.exp2(min(value, 1000.0))


def _tell(progress: Progress | None, index: int, token_set: TokenSet, what: str) -> None:
    if progress is not None:
        progress(index + 1, len(token_set.windows), what)
