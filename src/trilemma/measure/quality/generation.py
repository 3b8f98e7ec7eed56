"""Does it still write? Likelihood hides collapse, so greedy continuations are looked at too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trilemma.core.errors import InputError
from trilemma.runtime.engine import Engine, SamplingSettings

NGRAM = 4
LOOP_PERIOD = 8  # a tail that repeats with at most this period is a loop
LOOP_SHARE = 0.5  # when it fills this share of the answer
WORSE_BY = 0.25  # collapsed when so many more of the prompts fail than with the baseline


@dataclass(frozen=True)
class GenerationCheck:
    """What greedy continuations look like.

    repetition: share of 4-grams that occurred before in the same answer, mean over prompts;
    looping: share of prompts whose answer ends in a short loop; empty: share with fewer than 3 tokens;
    mean_length: tokens; answers: the tokens themselves; collapsed: see `generation_check`.
    """

    repetition: float
    looping: float
    empty: float
    mean_length: float
    answers: tuple[tuple[int, ...], ...]
    collapsed: bool


def generation_check(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 64,
    baseline: GenerationCheck | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> GenerationCheck:
    """Continue prompts greedily and look for loops and empty answers.

    With a baseline, `collapsed` means that looping or empty answers became more frequent by a
    quarter of the prompts (a small model may loop by nature); without one, that most answers do.

    Raises:
        InputError: no prompts.
    """
    if not prompts:
        raise InputError("The generation check needs at least one prompt.")
    settings = SamplingSettings(max_tokens=max_tokens)
    written = []
    for number, prompt in enumerate(prompts, 1):
        written.append(tuple(engine.generate(list(prompt), settings).tokens))
        if progress is not None:
            progress(number, len(prompts), "answers")
    answers = tuple(written)
    looping = float(np.mean([loops(answer) for answer in answers]))
    empty = float(np.mean([len(answer) < 3 for answer in answers]))
    failing = looping + empty
    allowed = 0.5 if baseline is None else min(1.0, baseline.looping + baseline.empty + WORSE_BY)
    return GenerationCheck(
        repetition=float(np.mean([repetition_rate(answer) for answer in answers])),
        looping=looping,
        empty=empty,
        mean_length=float(np.mean([len(answer) for answer in answers])),
        answers=answers,
        collapsed=failing > allowed if baseline is None else failing >= allowed,
    )


def repetition_rate(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of n-grams that occurred earlier in the same sequence; 0 when it is shorter than n."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether the tail repeats with a short period over a large share of the answer, at least three turns."""
    for period in range(1, LOOP_PERIOD + 1):
        same = 0
        while same + period < len(tokens) and tokens[-1 - same] == tokens[-1 - same - period]:
            same += 1
        length = same + period
        if same and length >= 3 * period and length >= LOOP_SHARE * len(tokens) and length >= 6:
            return True
    return False
