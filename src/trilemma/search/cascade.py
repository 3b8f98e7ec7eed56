"""Finds the confidence from which a small model's answers are good enough, and says how that is known.

Prompts are cut from the user's documents. For each one the small model answers as it would at run time,
which gives its confidence; the text's own continuation, scored by both models, says what keeping the
small one costs there (perplexity, and agreement with the large model's most likely tokens). So the
decision is the real one and the quality is paired.

The threshold goes down from the safest while every limit PASSes with its 95% interval on the documents
for choosing, and stops at the first that does not: fixed-sequence testing, which needs no correction for
having tried many (Bauer 1991; Angelopoulos et al. 2021, "Learn then test", arXiv:2110.01052). The verdicts
come from other documents. Left out: judging answers by another model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.core.environment import read_environment
from trilemma.core.errors import DataError, InputError, LimitError
from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.verdict import Verdict
from trilemma.data.documents import Document, Prepare, read_documents
from trilemma.data.split import split_documents
from trilemma.data.windows import make_windows
from trilemma.measure.stats import ratio_interval, share_interval
from trilemma.measure.token_scores import log_normalizer, token_nll
from trilemma.model.tokenizer import Tokenizer
from trilemma.model.write import model_hash
from trilemma.runtime.cascade import CascadeEngine, confidence, open_cascade
from trilemma.runtime.cascade_record import SIGNALS, CascadeRecord, CascadeRule, Signal
from trilemma.runtime.engine import Engine, EngineOptions, SamplingSettings
from trilemma.search.cascade_cost import Request, answer_costs, time_answers
from trilemma.search.judge import verdict
from trilemma.search.texts import describe_files

SHARES = (0.3, 0.2, 0.5)  # the first two choose the threshold together, the last one judges
LIMITED = ("ppl_increase", "top1_agreement")
MOST_LEVELS = 40
LEAST_CONTINUATION = 8  # tokens of text after a prompt

Progress = Callable[[int, int, str], None]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What a set of prompts says; one entry each: document, predicted tokens, nats of both, agreeing tokens.

    confidences: signal -> (prompts,) of the small model's answers.
    """

    documents: NDArray[np.int64]
    tokens: Float64
    small_nll: Float64
    large_nll: Float64
    agreeing: Float64
    confidences: dict[Signal, Float64]

    def kept(self, rule: CascadeRule | None) -> NDArray[np.bool_]:
        """Which answers stay with the small model; none without a rule."""
        if rule is None:
            return np.zeros(len(self.tokens), np.bool_)
        return self.confidences[rule.signal] >= rule.threshold


def calibrate_cascade(
    small: str | Path,
    large: str | Path,
    *,
    data: Sequence[str | Path],
    limits: Sequence[Limit | str],
    prompt_tokens: int = 32,
    max_tokens: int = 48,
    prompts: int = 240,
    prepare: Prepare = "none",
    seed: int = 0,
    options: EngineOptions | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> CascadeRecord | None:
    """Choose signal and threshold within the limits, then judge them on other documents.

    Args:
        small, large: models with the same tokenizer.
        data: text files like the texts to come.
        limits: on ppl_increase or top1_agreement, both against the large model.
        prompt_tokens, max_tokens: of each prompt, and of each answer.
        prompts: at most so many, spread over the documents; half of them judge.

    Returns:
        The record with verdicts and costs; None where no threshold holds the limits on the choosing part.

    Raises:
        LimitError: a limit on something else. DataError: too little text.
        InputError: models with different tokenizers, or lengths that do not fit their context.
    """
    asked = [one if isinstance(one, Limit) else Limit.parse(one) for one in limits]
    _require_quality(asked)
    files = [Path(item) for item in data]
    documents = read_documents(files, prepare=prepare)
    parts = split_documents(documents, seed, SHARES)
    keep_all = CascadeRule(signal="mean", threshold=0)
    with open_cascade(small, large, keep_all, options) as opened:
        engine, tokenizer = opened.engine, opened.tokenizer
        assert isinstance(engine, CascadeEngine)
        if prompt_tokens + max_tokens > engine.max_context:
            raise InputError(
                f"Prompts of {prompt_tokens} and answers of {max_tokens} tokens do not fit the context of "
                f"{engine.max_context}. Ask for fewer."
            )
        half = max(1, prompts // 2)
        settings = SamplingSettings(max_tokens=max_tokens)
        choosing = cut_requests([*parts.calibrate, *parts.select], tokenizer, prompt_tokens, max_tokens, half)
        seen = score_requests(engine, choosing, settings, progress, "choosing")
        rule = choose_rule(seen, asked)
        if rule is None:
            return None
        engine.rule = rule
        judging = cut_requests(parts.confirm, tokenizer, prompt_tokens, max_tokens, half)
        scores = score_requests(engine, judging, settings, progress, "confirming")
        times = time_answers(engine, judging, settings, progress)
        quality = {
            "cascade": quality_of(scores, rule),
            "small": quality_of(scores, keep_all),
            "large": quality_of(scores, None),
        }
        costs = answer_costs(engine, judging, settings, times, small, large)
        return CascadeRecord(
            small=str(small), large=str(large), small_hash=model_hash(small), large_hash=model_hash(large), rule=rule,
            prompt_tokens=prompt_tokens, max_tokens=max_tokens, verdicts=_judge(quality["cascade"], asked),
            measurements={name: quality[name] | costs[name] for name in quality},
            kept_share=float(np.mean(times.kept)), kept_token_share=times.kept_token_share,
            same_answer_share=float(np.mean(times.same)), relative_answer_s=times.relative(judging),
            calibration_answers=len(choosing), confirm_answers=len(judging), data_files=describe_files(files),
            environment=read_environment(isa=engine.isa, threads=engine.threads, seed=seed), command=command,
            notes=(*parts.notes, *([f"noisy: {times.noisy}"] if times.noisy else [])),
        )  # fmt: skip


def cut_requests(
    documents: Sequence[Document], tokenizer: Tokenizer, prompt_tokens: int, max_tokens: int, count: int
) -> list[Request]:
    """Prompts from all over the documents, with the text that follows each; special tokens as at run time.

    Raises:
        DataError: no document is long enough.
    """
    window = prompt_tokens + max_tokens
    cut = make_windows(documents, tokenizer.encode_plain, window, count * window)
    lead = _leading(tokenizer)
    found = [
        Request(int(document), [*lead, *map(int, tokens[:prompt_tokens])], [int(one) for one in tokens[prompt_tokens:]])
        for document, tokens in zip(cut.documents, cut.windows, strict=True)
        if len(tokens) >= prompt_tokens + LEAST_CONTINUATION
    ]
    if not found:
        raise DataError(
            f"No document has {prompt_tokens + LEAST_CONTINUATION} tokens, which a prompt and its continuation need. "
            "Give longer texts, or fewer --prompt-tokens."
        )
    return found


def score_requests(
    engine: CascadeEngine,
    requests: Sequence[Request],
    settings: SamplingSettings,
    progress: Progress | None = None,
    what: str = "scoring",
) -> Scores:
    """The small model's confidence in its own answers, and both models' likelihood of the text that follows."""
    small_nll, large_nll, agreeing = [], [], []
    confidences: dict[Signal, list[float]] = {signal: [] for signal in SIGNALS}
    for index, request in enumerate(requests):
        answer = engine.try_small(request.prompt, settings)
        for signal in SIGNALS:
            confidences[signal].append(confidence(answer.probabilities, signal))
        little, its_best = _continuation(engine.small, request)
        great, best = _continuation(engine.large, request)
        small_nll.append(little)
        large_nll.append(great)
        agreeing.append(float(np.count_nonzero(its_best == best)))
        if progress is not None:
            progress(index + 1, len(requests), f"{what}: prompts")
    return Scores(
        np.array([one.document for one in requests]), np.array([float(len(one.text)) for one in requests]),
        np.array(small_nll), np.array(large_nll), np.array(agreeing),
        {signal: np.array(values) for signal, values in confidences.items()},
    )  # fmt: skip


def choose_rule(scores: Scores, limits: Sequence[Limit]) -> CascadeRule | None:
    """The signal and threshold that keep most answers within the limits; None where the first step fails."""
    best: tuple[int, CascadeRule] | None = None
    for signal in SIGNALS:
        levels = np.unique(scores.confidences[signal])[::-1]
        picked = levels[np.unique(np.linspace(0, len(levels) - 1, min(MOST_LEVELS, len(levels))).round().astype(int))]
        for place, level in enumerate(picked):
            threshold = 0.0 if place == len(picked) - 1 else float(level)
            rule = CascadeRule(signal=signal, threshold=threshold)
            if any(found.outcome != "PASS" for found in _judge(quality_of(scores, rule), limits)):
                break
            kept = int(np.count_nonzero(scores.kept(rule)))
            if best is None or kept > best[0]:
                best = kept, rule
    return None if best is None else best[1]


def quality_of(scores: Scores, rule: CascadeRule | None) -> dict[str, Measurement]:
    """ppl_increase and top1_agreement of the cascade against the large model alone, intervals over documents."""
    kept = scores.kept(rule)
    names, owner = np.unique(scores.documents, return_inverse=True)

    def per_document(values: Float64) -> Float64:
        return np.bincount(owner, weights=values, minlength=len(names)).astype(np.float64)

    counts = per_document(scores.tokens)
    nats = ratio_interval(per_document(np.where(kept, scores.small_nll - scores.large_nll, 0.0)), counts)
    agree = share_interval(per_document(np.where(kept, scores.agreeing, scores.tokens)), counts)
    conditions: dict[str, str | int | float] = {
        "documents": len(names), "answers": len(kept), "kept_share": float(kept.mean()), "tokens": int(counts.sum()),
    }  # fmt: skip
    method = "paired, against the large model on the text after each prompt; 95% interval over documents"
    low, high = (None, None) if nats.ci95 is None else (float(np.expm1(edge)) for edge in nats.ci95)
    return {
        "ppl_increase": Measurement.of(
            "ppl_increase", float(np.expm1(nats.value)), method=method, n=len(names), conditions=conditions,
            ci95=None if low is None or high is None else (low, high),
        ),
        "top1_agreement": Measurement.of(
            "top1_agreement", agree.value, method=method, n=len(names), conditions=conditions, ci95=agree.ci95
        ),
    }  # fmt: skip


def _judge(measurements: dict[str, Measurement], limits: Sequence[Limit]) -> tuple[Verdict, ...]:
    return tuple(verdict(limit, measurements[limit.metric]) for limit in limits)


def _require_quality(limits: Sequence[Limit]) -> None:
    if not limits:
        raise LimitError("A cascade needs a quality limit, for example --limit 'ppl_increase<=2%'.")
    for limit in limits:
        if limit.metric not in LIMITED:
            raise LimitError(
                f"The limit '{limit.text}' can not steer a cascade; its threshold is calibrated to "
                f"{' or '.join(LIMITED)} against the large model. Time and energy are reported beside them."
            )


def _continuation(engine: Engine, request: Request) -> tuple[float, NDArray[np.int64]]:
    """Nats of the text after the prompt, and the most likely token at each of its places."""
    tokens = [*request.prompt, *request.text]
    logits = engine.logits(tokens[:-1])[len(request.prompt) - 1 :]
    normalizer = log_normalizer(logits)
    nll = token_nll(logits, np.asarray(request.text, np.int32), normalizer)
    if not np.isfinite(nll).all():
        raise InputError(f"The model in '{engine.name}' gives logits that are not finite; it can not be calibrated.")
    return float(nll.sum()), logits.argmax(axis=1)


def _leading(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that stand before a prompt (BOS)."""
    whole, plain = tokenizer.encode("a"), tokenizer.encode_plain("a")
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []
