"""Finds the confidence from which a small model's answers are good enough, and says how that is known.

Prompts are cut from the user's documents, and the small model answers each as it would at run time. Two
figures say what keeping its answer costs, both against the large model:
- `top1_agreement` on the answer: for which share of its tokens the large model, after the same words,
  would have chosen the same token. An answer that the large one gives agrees wholly;
- `ppl_increase` on the text that really follows the prompt, scored by whichever model is chosen.
The first is what confidence can predict; the second hardly depends on it (docs/log.md has figures), so a
limit on it makes the cascade keep about as many answers as chance would allow. Each figure is stated
beside the one that the same share of answers, kept at random, would give.

The threshold goes down from the safest while every limit PASSes with a widened 95% interval on the
documents for choosing, and stops at the first that does not: fixed-sequence testing, which needs no
correction for having tried many (Bauer 1991; Angelopoulos et al. 2021, "Learn then test",
arXiv:2110.01052). The verdicts come from other documents. Left out: judging answers by another model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.core.environment import read_environment
from trilemma.core.errors import DataError, EngineError, InputError, LimitError
from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.verdict import Verdict
from trilemma.data.documents import Document, Prepare, read_documents
from trilemma.data.split import split_documents
from trilemma.data.windows import make_windows
from trilemma.formats.artifact import load_any
from trilemma.measure.quality.token_scores import log_normalizer, token_nll
from trilemma.measure.stats import RESAMPLES, ratio_interval, share_interval
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
MOST_LEVELS = 24
TRIAL_RESAMPLES = 1000  # of the bootstrap while choosing, at up to 48 thresholds
TIMED = 48  # prompts that are timed
MARGIN = 1.7  # of the interval while choosing: then five of six confirmations PASS, not half ((1.96 + sqrt 2) / 1.96)
LEAST_CONTINUATION = 8  # tokens of text after a prompt

Progress = Callable[[int, int, str], None]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What a set of prompts says, one entry each.

    documents: whose; text_tokens, small_nll, large_nll: of the text that follows, in nats; answer_tokens,
    agreeing: of the small model's answer; confidences: signal -> (prompts,) of that answer.
    """

    documents: NDArray[np.int64]
    text_tokens: Float64
    small_nll: Float64
    large_nll: Float64
    answer_tokens: Float64
    agreeing: Float64
    confidences: dict[Signal, Float64]

    def kept(self, rule: CascadeRule | None) -> NDArray[np.bool_]:
        """Which answers stay with the small model; none without a rule."""
        if rule is None:
            return np.zeros(len(self.documents), np.bool_)
        return self.confidences[rule.signal] >= rule.threshold


def calibrate_cascade(
    small: str | Path,
    large: str | Path,
    *,
    data: Sequence[str | Path],
    limits: Sequence[Limit | str],
    prompt_tokens: int = 32,
    max_tokens: int = 48,
    prompts: int = 200,
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
        timed = judging[:: max(1, len(judging) // TIMED)]
        times = time_answers(engine, timed, settings, progress)
        quality = {
            "cascade": quality_of(scores, rule),
            "small": quality_of(scores, keep_all),
            "large": quality_of(scores, None),
        }
        costs = answer_costs(engine, timed, settings, times, small, large)
        return CascadeRecord(
            small=str(small), large=str(large), rule=rule,
            small_hash=model_hash(load_any(small)), large_hash=model_hash(load_any(large)),
            prompt_tokens=prompt_tokens, max_tokens=max_tokens, verdicts=_judge(quality["cascade"], asked),
            measurements={name: quality[name] | costs[name] for name in quality},
            kept_share=float(scores.kept(rule).mean()), kept_token_share=times.kept_token_share,
            same_answer_share=float(np.mean(times.same)), relative_answer_s=times.relative(timed),
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
    rows: list[tuple[float, ...]] = []
    confidences: dict[Signal, list[float]] = {signal: [] for signal in SIGNALS}
    for index, request in enumerate(requests):
        answer = engine.try_small(request.prompt, settings)
        assert answer.generation is not None
        for signal in SIGNALS:
            confidences[signal].append(confidence(answer.probabilities, signal))
        tokens = answer.generation.tokens
        agreeing = _agreeing(engine.large, request.prompt, tokens)
        small_nll, large_nll = (_text_nll(one, request) for one in (engine.small, engine.large))
        rows.append((request.document, len(request.text), small_nll, large_nll, len(tokens), agreeing))
        if progress is not None:
            progress(index + 1, len(requests), f"{what}: prompts")
    table = np.array(rows, np.float64)  # (prompts, 6)
    return Scores(
        table[:, 0].astype(np.int64), table[:, 1], table[:, 2], table[:, 3], table[:, 4], table[:, 5],
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
            found = quality_of(scores, rule, [limit.metric for limit in limits], TRIAL_RESAMPLES)
            if any(one.outcome != "PASS" for one in _judge(found, limits, MARGIN)):
                break
            kept = int(np.count_nonzero(scores.kept(rule)))
            if best is None or kept > best[0]:
                best = kept, rule
    return None if best is None else best[1]


def quality_of(
    scores: Scores, rule: CascadeRule | None, metrics: Sequence[str] = LIMITED, resamples: int = RESAMPLES
) -> dict[str, Measurement]:
    """ppl_increase and top1_agreement against the large model alone, with intervals over documents.

    Args:
        rule: which answers stay with the small model; None keeps none.
        metrics: those that are wanted; resamples: of the intervals.

    Returns:
        Measurements whose conditions hold `at_random`: the value if as many answers were kept by chance.
    """
    kept = scores.kept(rule)
    names, owner = np.unique(scores.documents, return_inverse=True)

    def per_document(values: Float64) -> Float64:
        return np.bincount(owner, weights=values, minlength=len(names)).astype(np.float64)

    share = float(kept.mean())
    conditions: dict[str, str | int | float] = {"documents": len(names), "answers": len(kept), "kept_share": share}
    against = "against the large model, 95% interval over documents"
    found = {}
    if "ppl_increase" in metrics:
        lost = scores.small_nll - scores.large_nll
        nats = ratio_interval(
            per_document(np.where(kept, lost, 0.0)), per_document(scores.text_tokens), resamples=resamples
        )
        chance = float(np.expm1(share * lost.sum() / scores.text_tokens.sum()))
        found["ppl_increase"] = Measurement.of(
            "ppl_increase", float(np.expm1(nats.value)), method=f"on the text after each prompt, paired {against}",
            n=len(names), conditions={**conditions, "at_random": chance},
            ci95=None if nats.ci95 is None else (float(np.expm1(nats.ci95[0])), float(np.expm1(nats.ci95[1]))),
        )  # fmt: skip
    if "top1_agreement" in metrics:
        counts = np.maximum(scores.answer_tokens, 1.0)  # an empty answer counts as one token that agrees
        agreeing = np.where(scores.answer_tokens == 0, 1.0, scores.agreeing)
        agree = share_interval(per_document(np.where(kept, agreeing, counts)), per_document(counts))
        chance = 1 - share * float(1 - agreeing.sum() / counts.sum())
        found["top1_agreement"] = Measurement.of(
            "top1_agreement", agree.value, method=f"on the answers' tokens, {against}", ci95=agree.ci95,
            n=len(names), conditions={**conditions, "at_random": chance},
        )  # fmt: skip
    return found


def _judge(measurements: dict[str, Measurement], limits: Sequence[Limit], margin: float = 1.0) -> tuple[Verdict, ...]:
    return tuple(verdict(limit, measurements[limit.metric], margin=margin) for limit in limits)


def _require_quality(limits: Sequence[Limit]) -> None:
    if not limits:
        raise LimitError("A cascade needs a quality limit, for example --limit 'agreement>=95%'.")
    for limit in limits:
        if limit.metric not in LIMITED:
            raise LimitError(
                f"The limit '{limit.text}' can not steer a cascade; its threshold is calibrated to "
                f"{' or '.join(LIMITED)} against the large model. Time and energy are reported beside them."
            )


def _text_nll(engine: Engine, request: Request) -> float:
    """Nats of the text that follows the prompt."""
    logits = engine.logits([*request.prompt, *request.text[:-1]])[len(request.prompt) - 1 :]
    nll = token_nll(logits, np.asarray(request.text, np.int32), log_normalizer(logits))
    if not np.isfinite(nll).all():
        raise EngineError("A model gives logits that are not finite; it can not be part of a cascade.")
    return float(nll.sum())


def _agreeing(engine: Engine, prompt: list[int], answer: list[int]) -> int:
    """Tokens of an answer that the engine would have chosen after the same words."""
    if not answer:
        return 0
    best = engine.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :].argmax(axis=1)
    return int(np.count_nonzero(best == np.asarray(answer)))


def _leading(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that stand before a prompt (BOS)."""
    whole, plain = tokenizer.encode("a"), tokenizer.encode_plain("a")
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []
