"""How texts are named: a file, a field of its rows, a weight; and rows that can not be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trilemma.core.errors import DataError
from trilemma.data.documents import read_documents
from trilemma.data.text_source import TextSource, read_sources, weights_of, with_weights


@pytest.mark.parametrize(
    ("given", "path", "field", "weight"),
    [
        ("books.txt", "books.txt", None, None),
        ("a/b.c/books.txt:0.7", "a/b.c/books.txt", None, 0.7),
        ("rows.jsonl#body", "rows.jsonl", "body", None),
        ("rows.jsonl.xz#body:3", "rows.jsonl.xz", "body", 3.0),
        ("rows.jsonl#the text:1e-3", "rows.jsonl", "the text", 1e-3),
        ("C:old/books.txt", "C:old/books.txt", None, None),
        ("books.txt:heavy", "books.txt:heavy", None, None),
    ],
)
def test_a_source_is_a_file_a_field_and_a_weight(given, path, field, weight):
    for form in (given, Path(given)):
        assert TextSource.parse(form) == TextSource(Path(path), field, weight)


def test_a_file_of_that_name_is_that_file(tmp_path):
    file = tmp_path / "odd#name:0.5"
    file.write_text("text of it", encoding="utf-8")
    assert TextSource.parse(file) == TextSource(file)
    assert [item.text for item in read_documents(str(file))] == ["text of it"]
    assert TextSource.parse(f"{file}:0.25") == TextSource(file, None, 0.25)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1.2.3"])
def test_weights_are_positive_numbers(weight):
    with pytest.raises(DataError, match=r"positive number, such as books\.txt:0\.7"):
        TextSource.parse(f"books.txt:{weight}")


def test_all_files_have_weights_or_none():
    assert weights_of(read_sources(["a", "b"])) is None
    assert weights_of(read_sources(["a:2", "b:1"])) == (2.0, 1.0)
    with pytest.raises(DataError, match=r"'b' has no weight.*'b:0\.5'"):
        weights_of(read_sources(["a:2", "b"]))


def test_a_replay_takes_the_recipe_weights():
    plain = read_sources(["a", "b"])
    assert weights_of(with_weights(plain, (2.0, 1.0))) == (2.0, 1.0)
    assert with_weights(plain, None) == plain
    assert weights_of(with_weights(read_sources(["a:2", "b:1"]), (2.0, 1.0))) == (2.0, 1.0)
    with pytest.raises(DataError, match=r"the weights 2, 1, not the weights 1, 1"):
        with_weights(read_sources(["a:1", "b:1"]), (2.0, 1.0))
    with pytest.raises(DataError, match="no weights, not the weights 1, 1"):
        with_weights(read_sources(["a:1", "b:1"]), None)
    with pytest.raises(DataError, match="made with 2 files of text; 1 were given"):
        with_weights(read_sources(["a"]), (2.0, 1.0))


def test_another_field_is_taken_where_it_is_named(tmp_path):
    rows = [{"text": "not this", "body": "this"}, {"body": "and this"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    for name in ("a.jsonl", "a.json"):
        assert [item.text for item in read_documents(f"{tmp_path / name}#body")] == ["this", "and this"]
    both = read_documents([f"{tmp_path}/a.json#body", f"{tmp_path}/a.jsonl#body"])
    assert [item.file for item in both] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a.jsonl#other", ["a.jsonl", "line 1", "body", "a field 'other'", "a.jsonl#FIELD"]),
        ("a.jsonl", ["a.jsonl", "line 1", "'messages'", "a.jsonl#FIELD"]),
        ("a.txt#body", ["a.txt", "plain text"]),
        ("a.txt:0.5", ["a.txt:0.5", "calibration text alone"]),
        ("b.txt:half", ["does not exist", "A weight is a number"]),
    ],
)
def test_what_does_not_fit_the_file_is_named(tmp_path, given, words):
    (tmp_path / "a.jsonl").write_text('{"body": "this"}\n', encoding="utf-8")
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_documents(f"{tmp_path}/{given}")
    for word in words:
        assert word in str(error.value)
