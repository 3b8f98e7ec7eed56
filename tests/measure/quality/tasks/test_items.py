"""Task files: every form read as it stands, every fault named with its line."""

from __future__ import annotations

import json
import lzma

import pytest

from trilemma.core.errors import DataError
from trilemma.measure.quality.tasks.items import read_task


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_choices_contexts_and_continuations(tmp_path):
    choices = read_task(
        "a", write(tmp_path / "a.jsonl", [{"query": "Two and two", "choices": ["é", "four"], "gold": 1}])
    )
    assert choices.kind == "choices"
    assert choices.items[0].options == (("Two and two", " é"), ("Two and two", " four"))
    assert choices.items[0].gold == 1
    assert choices.items[0].lengths == (1, 4)
    row = {"context_options": ["He", "She "], "continuation": "left.", "gold": 0}
    contexts = read_task("b", write(tmp_path / "b.jsonl", [row]))
    assert contexts.kind == "contexts"
    assert contexts.items[0].options == (("He", " left."), ("She ", "left."))
    words = read_task("c", write(tmp_path / "c.jsonl", [{"context": "Once upon a", "continuation": "time"}]))
    assert words.kind == "continuation"
    assert words.items[0].options == (("Once upon a", " time"),)


def test_no_space_is_put_where_one_is(tmp_path):
    rows = [{"query": "Q?\n", "choices": ["x", " y"], "gold": 0}, {"query": "", "choices": ["x", " y"], "gold": 0}]
    task = read_task("a", write(tmp_path / "a.jsonl", rows))
    assert [text for item in task.items for _, text in item.options] == ["x", " y", "x", " y"]


def test_the_text_form_of_hellaswag(tmp_path):
    text = "A man sits: he\n3\nis.\nrips.\nholds.\nstarts.\nTwo: they\n0\na\nb\nc\nd\n"
    (tmp_path / "h.txt.xz").write_bytes(lzma.compress(text.encode()))
    task = read_task("hellaswag", tmp_path / "h.txt.xz")
    assert [item.gold for item in task.items] == [3, 0]
    assert task.items[0].options[3] == ("A man sits: he", " starts.")
    assert len(read_task("hellaswag", tmp_path / "h.txt.xz", 1).items) == 1


GOOD = {"query": "a", "choices": ["b", "c"], "gold": 0}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps(GOOD), "{"], "line 2 is not JSON"),
        (["[1]"], "line 1 is a list"),
        ([json.dumps({"text": "a"})], r"line 1 has the keys \['text'\]"),
        ([json.dumps(GOOD), json.dumps({"query": "a"})], "line 2 is not of the form"),
        ([json.dumps({**GOOD, "gold": 2})], r"gold is 2, but the options are 0\.\.1"),
        ([json.dumps({**GOOD, "gold": -1})], "gold is -1"),
        ([json.dumps({**GOOD, "choices": ["", "c"]})], "empty answer"),
    ],
)
def test_faults_are_named(tmp_path, lines, message):
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        read_task("t", tmp_path / "t.jsonl")


def test_files_that_are_no_tasks(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_task("t", tmp_path / "none.jsonl")
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="6 an item"):
        read_task("t", tmp_path / "t.txt")
    (tmp_path / "six.txt").write_text("one\n9\na\nb\nc\nd\n")
    with pytest.raises(DataError, match="line 2"):
        read_task("t", tmp_path / "six.txt")
    with pytest.raises(DataError, match="name"):
        read_task("a/b", tmp_path / "t.txt")


@pytest.mark.shared
def test_the_shared_tasks_are_read(shared_dir):
    counts = {"arc_easy": 2376, "boolq": 3270, "copa": 100, "lambada_openai": 5153, "piqa": 1838, "winogrande": 1267}
    for name, count in counts.items():
        assert len(read_task(name, shared_dir / "data/tasks" / f"{name}.jsonl").items) == count
    assert len(read_task("hellaswag", shared_dir / "data/tasks/hellaswag_val.txt.xz").items) == 10042
