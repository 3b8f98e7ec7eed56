"""The generation check as measurements: counted by hand, side by side, from the beginnings of the texts."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.measure.quality.answers import answer_figures, generation_row, prompts_from
from trilemma.measure.quality.generation import GenerationCheck, generation_check
from trilemma.measure.quality.item_shares import share_of_items
from trilemma.measure.results import GenerationRow

ANSWERS = ([1, 2, 3, 4, 5, 6, 7, 8], [7] * 8, [1, 2], list(range(8)))
BEFORE = ([1, 2, 3, 4, 5, 6, 7, 8], [7, 7, 7, 9, 9, 1, 2, 3], [1, 2, 3], list(range(8)))


def check_of(fake_engine, answers) -> GenerationCheck:
    return generation_check(
        fake_engine(answers=lambda prompt, settings: list(answers[prompt[0]])), [[0], [1], [2], [3]]
    )


def test_figures_by_hand(fake_engine):
    found = answer_figures(check_of(fake_engine, ANSWERS), check_of(fake_engine, BEFORE), max_tokens=8)
    assert found["repetition_rate"].value == pytest.approx((0 + 4 / 5 + 0 + 0) / 4)
    assert found["looping_rate"].value == 0.25
    assert found["empty_rate"].value == 0.25
    assert found["answer_tokens"].value == pytest.approx(26 / 4)
    assert found["changed_answers"].value == 0.5
    assert found["agreed_tokens"].value == pytest.approx((8 + 3 + 2 + 8) / 4)
    share = share_of_items([True, False, False, False])
    assert found["looping_rate"].ci95 == (share.low, share.high)
    assert all(item.n == 4 and item.conditions["max_tokens"] == 8 for item in found.values())
    assert found["answer_tokens"].ci95[1] <= 8
    alone = answer_figures(check_of(fake_engine, ANSWERS), max_tokens=8)
    assert "changed_answers" not in alone


def test_side_by_side_shows_what_parts_first(fake_engine):
    prompts = [[0], [1], [2], [3]]
    row = generation_row(prompts, check_of(fake_engine, ANSWERS), check_of(fake_engine, BEFORE), str, max_tokens=8)
    assert [pair.first_difference for pair in row.answers] == [2, 3, None, None]
    assert row.answers[0].prompt == "[2]"
    assert row.answers[0].reference == "(1, 2, 3)"
    assert GenerationRow.model_validate_json(row.model_dump_json()) == row
    alone = generation_row(prompts, check_of(fake_engine, ANSWERS), None, str, max_tokens=8)
    assert alone.answers[0].reference is None


def test_prompts_come_from_all_documents_first(make_token_set):
    tokens = make_token_set(np.random.default_rng(1), documents=5, windows=3, context=9)
    found = prompts_from(tokens, 7, length=3)
    firsts = [0, 3, 6, 9, 12, 1, 4]
    assert found == [tokens.windows[index][:3].tolist() for index in firsts]
    assert max(map(len, prompts_from(tokens, 99))) <= 4  # half of the context
    assert prompts_from(tokens, 0) == []
