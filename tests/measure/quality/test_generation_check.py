"""Collapse of generation: loops and silence are seen, ordinary text is not accused."""

from __future__ import annotations

import pytest

from trilemma.core.errors import InputError
from trilemma.measure.quality.generation import generation_check, repetition_rate


def always(tokens):
    return lambda prompt, settings: list(tokens)


def test_repetition_rate_by_hand():
    assert repetition_rate([1, 2, 3, 4, 5]) == 0
    assert repetition_rate([1, 1, 1, 1, 1, 1]) == pytest.approx(1 - 1 / 3)
    assert repetition_rate([1, 2]) == 0


@pytest.mark.parametrize(
    ("answer", "collapsed"),
    [
        (range(40), False),
        ([7] * 40, True),
        ([*range(10), *[3, 4, 5] * 10], True),
        ([*range(30), *[3, 4, 5] * 3], False),
        ([*range(20), *range(20)], False),
        ([1], True),
        ([], True),
    ],
)
def test_loops_and_silence(fake_engine, answer, collapsed):
    found = generation_check(fake_engine(answers=always(answer)), [[1, 2]] * 4)
    assert found.collapsed is collapsed
    assert found.mean_length == len(list(answer))
    assert found.answers[0] == tuple(answer)


def test_a_model_that_loops_by_nature_is_judged_against_itself(fake_engine):
    base = generation_check(
        fake_engine(answers=lambda p, s: [7] * 30 if p[0] < 6 else range(30)), [[k] for k in range(10)]
    )
    assert base.looping == pytest.approx(0.6)
    same = generation_check(fake_engine(answers=lambda p, s: [7] * 30 if p[0] < 6 else range(30)),
                            [[k] for k in range(10)], baseline=base)  # fmt: skip
    worse = generation_check(fake_engine(answers=always([7] * 30)), [[k] for k in range(10)], baseline=base)
    assert not same.collapsed
    assert worse.collapsed


def test_no_prompts_is_an_error(fake_engine):
    with pytest.raises(InputError, match="at least one prompt"):
        generation_check(fake_engine(), [])
