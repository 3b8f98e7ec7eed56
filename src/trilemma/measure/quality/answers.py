"""The generation check as measurements: repetition, loops, silence, length, and what changed against the reference.

A changed answer is no error by itself: greedy text parts for good after one near tie. Together with how early
answers part, and with loops, it shows what likelihood hides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from trilemma.core.measurement import Measurement
from trilemma.data.windows import TokenSet
from trilemma.measure.quality.generation import GenerationCheck, loops, repetition_rate
from trilemma.measure.quality.item_shares import first_difference, share_of_items
from trilemma.measure.results import AnswerPair, GenerationRow
from trilemma.measure.stats import Interval, ratio_interval

PROMPT_TOKENS = 32
SHOWN_ANSWERS = 5

_SHARES = "Wilson interval over prompts"
_MEANS = "95% symmetric percentile-t bootstrap over prompts"


def prompts_from(token_set: TokenSet, count: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
    """Beginnings of the texts as prompts: the first window of each document first, then the second ones.

    Returns:
        At most `count` lists of at most `length` tokens (half a window where that is shorter).
    """
    seen: dict[int, int] = {}
    turns = []
    for document in token_set.documents:
        turns.append(seen.get(int(document), 0))
        seen[int(document)] = turns[-1] + 1
    order = np.argsort(np.asarray(turns), kind="stable")[:count]
    room = max(1, min(length, token_set.context // 2))
    return [[int(token) for token in token_set.windows[index][:room]] for index in order]


def answer_figures(
    check: GenerationCheck, reference: GenerationCheck | None = None, *, max_tokens: int
) -> dict[str, Measurement]:
    """Measurements of a generation check; against a reference also changed_answers and agreed_tokens.

    `max_tokens` is the most that an answer could have. Shares have Wilson's interval, means a bootstrap over prompts.
    """
    answers = check.answers
    conditions: dict[str, str | int | float] = {"prompts": len(answers), "max_tokens": max_tokens}

    def measure(metric: str, found: Interval, method: str) -> Measurement:
        return Measurement.of(
            metric, found.value, method=f"greedy; {method}", ci95=found.ci95, n=len(answers), conditions=conditions
        )

    def share(metric: str, hits: Sequence[bool]) -> tuple[str, Measurement]:
        return metric, measure(metric, share_of_items(hits), _SHARES)

    def mean(metric: str, values: Sequence[float], most: float) -> tuple[str, Measurement]:
        return metric, measure(metric, _mean(values, most), _MEANS)

    found = dict([
        mean("repetition_rate", [repetition_rate(answer) for answer in answers], 1.0),
        share("looping_rate", [loops(answer) for answer in answers]),
        share("empty_rate", [len(answer) < 3 for answer in answers]),
        mean("answer_tokens", [len(answer) for answer in answers], max_tokens),
    ])  # fmt: skip
    if reference is not None:
        parted = [first_difference(old, new) for old, new in zip(reference.answers, answers, strict=True)]
        agreed = [len(answer) if at is None else at for answer, at in zip(answers, parted, strict=True)]
        found |= dict([
            share("changed_answers", [at is not None for at in parted]), mean("agreed_tokens", agreed, max_tokens),
        ])  # fmt: skip
    return found


def generation_row(
    prompts: Sequence[Sequence[int]],
    check: GenerationCheck,
    reference: GenerationCheck | None,
    decode: Callable[[Sequence[int]], str],
    *,
    max_tokens: int,
) -> GenerationRow:
    """The figures with a few answers side by side, those that part earliest first."""
    old = check.answers if reference is None else reference.answers
    pairs = [
        AnswerPair(
            prompt=decode(prompt), reference=None if reference is None else decode(before), answer=decode(answer),
            first_difference=None if reference is None else first_difference(before, answer),
        )
        for prompt, before, answer in zip(prompts, old, check.answers, strict=True)
    ]  # fmt: skip
    changed_first = sorted(pairs, key=lambda pair: (pair.first_difference is None, pair.first_difference or 0))
    return GenerationRow(
        prompts=len(prompts), max_tokens=max_tokens, collapsed=check.collapsed,
        measurements=answer_figures(check, reference, max_tokens=max_tokens),
        answers=tuple(changed_first[:SHOWN_ANSWERS]),
    )  # fmt: skip


def _mean(values: Sequence[float], most: float) -> Interval:
    data: NDArray[np.float64] = np.asarray(values, np.float64)
    found = ratio_interval(data, np.ones(len(data)))
    if found.low is None or found.high is None:
        return found
    return Interval(found.value, max(0.0, found.low), min(most, found.high))
