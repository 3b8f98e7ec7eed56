"""The journal after kills: what was finished is found again, under the same circumstances only."""

import pytest

from made_up_trials import INT4_G32, INT8
from trilemma.core.errors import OutputError
from trilemma.search.journal import Journal
from trilemma.search.plan import plan_text

CIRCUMSTANCES = {"model": "abc", "threads": 2}
PLAN = plan_text(10_000, 30, 512)


def journal(folder, circumstances=CIRCUMSTANCES, limit_s=30.0, plan=PLAN):
    return Journal(folder, circumstances, limit_s, lambda: plan)


def test_trials_are_found_again(tmp_path):
    first = journal(tmp_path / "out.search")
    assert first.find(INT8.recipe) is None
    first.keep(INT8)
    assert first.find(INT8.recipe) == INT8
    again = journal(tmp_path / "out.search")
    assert again.find(INT8.recipe) == INT8
    assert again.find(INT4_G32.recipe) is None


def test_other_circumstances_find_nothing(tmp_path):
    journal(tmp_path).keep(INT8)
    assert journal(tmp_path, {**CIRCUMSTANCES, "threads": 1}).find(INT8.recipe) is None


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_cut_last_line_loses_only_itself(tmp_path, cut):
    first = journal(tmp_path)
    first.keep(INT8)
    first.keep(INT4_G32)
    file = tmp_path / "trials.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    again = journal(tmp_path)
    assert again.find(INT8.recipe) == INT8
    if cut > 1:  # without its line break alone the line is still whole
        assert again.find(INT4_G32.recipe) is None
    again.keep(INT4_G32)  # it must not be glued to what the kill left
    last = journal(tmp_path)
    assert last.find(INT4_G32.recipe) == INT4_G32
    assert last.find(INT8.recipe) == INT8


def test_lines_that_are_no_text_are_passed_over(tmp_path):
    first = journal(tmp_path)
    first.keep(INT8)
    with (tmp_path / "trials.jsonl").open("ab") as file:
        file.write(b"\xff\x00\xfe\n{}\n\n")
    assert journal(tmp_path).find(INT8.recipe) == INT8


def test_amounts_of_text_stay_as_they_were_settled(tmp_path):
    faster = plan_text(20_000, 30, 512)
    assert faster != PLAN
    first = journal(tmp_path)
    first.keep(INT8)
    again = journal(tmp_path, plan=faster)
    assert again.text_plan == PLAN
    assert again.find(INT8.recipe) == INT8


def test_more_time_measures_on_more_text_but_keeps_what_was_built(tmp_path):
    first = journal(tmp_path)
    first.keep(INT8)
    longer = journal(tmp_path, limit_s=60, plan=plan_text(10_000, 60, 512))
    assert longer.text_plan.select_tokens > first.text_plan.select_tokens
    assert longer.find(INT8.recipe) is None
    assert longer.artifact_folder(INT8.recipe) == first.artifact_folder(INT8.recipe)
    assert longer.artifact_folder(INT8.recipe) != longer.artifact_folder(INT4_G32.recipe)


def test_a_damaged_plan_is_made_anew(tmp_path):
    journal(tmp_path)
    (tmp_path / "plan.json").write_text('{"key": "')
    assert journal(tmp_path).text_plan == PLAN


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        journal(tmp_path / "file" / "out.search")


def test_remove_leaves_nothing(tmp_path):
    first = journal(tmp_path / "out.search")
    first.keep(INT8)
    first.remove()
    assert list(tmp_path.iterdir()) == []
