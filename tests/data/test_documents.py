"""Reading texts: forms, cutting, preparation, and every kind of bad file."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest

from trilemma.core.errors import DataError
from trilemma.data.documents import Document, cut_document, prepare_text, read_documents


def test_text_is_split_at_the_end_mark(tmp_path):
    file = tmp_path / "tales.txt"
    file.write_text("one\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n\n", encoding="utf-8")
    found = read_documents(file)
    assert [item.text for item in found] == ["one\ntwo", "three"]
    assert [item.domain for item in found] == ["tales", "tales"]
    assert found[1].source == "tales.txt, document 2"


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_packed_files_read_like_plain_ones(tmp_path, suffix, pack):
    rows = [{"text": "première"}, {"text": "seconde"}]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / f"b.jsonl{suffix}").write_bytes(pack(text.encode()))
    plain, packed = read_documents(tmp_path / "a.jsonl"), read_documents(tmp_path / f"b.jsonl{suffix}")
    assert [item.text for item in plain] == [item.text for item in packed] == ["première", "seconde"]


def test_json_holds_strings_or_texts(tmp_path):
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps(["a b", {"text": "c d", "id": 3}]), encoding="utf-8")
    assert [item.text for item in read_documents(str(file), domain="x")] == ["a b", "c d"]
    assert read_documents(str(file), domain="x")[0].domain == "x"


def test_preparation_joins_lines_and_drops_underscores():
    text = "A _very_ short\nparagraph.\n \n\nAnother,\nbroken\ntwice.\n"
    assert prepare_text(text, "book") == "A very short paragraph.\nAnother, broken twice."
    assert prepare_text(text, "none") == text
    with pytest.raises(DataError, match="none, book"):
        prepare_text(text, "wiki")


def test_cutting_loses_nothing_and_starts_at_headings():
    chapters = [
        f"CHAPTER {n}\n\n" + "\n\n".join(f"Paragraph {n}.{k} " + "word " * 40 for k in range(9)) for n in range(8)
    ]
    document = Document("\n\n".join(chapters), "d", "s")
    found = cut_document(document, aim=2000)
    assert "".join(item.text for item in found) == document.text
    assert len(found) == 8
    assert all(item.text.startswith("CHAPTER") for item in found)


@pytest.mark.parametrize("unit", ["no break at all ", "x", "line of text\n", "a paragraph\n\n"])
def test_cutting_bounds_sections_whatever_the_text(unit):
    document = Document(unit * (50_000 // len(unit)), "d", "s")
    found = cut_document(document, aim=3000)
    assert "".join(item.text for item in found) == document.text
    assert max(len(item.text) for item in found) <= 4500 + 3000 // 4
    assert min(len(item.text) for item in found) >= 3000 // 4


def test_a_short_document_stays_whole():
    document = Document("short", "d", "s")
    assert cut_document(document, aim=1000) == [document]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.txt", b"  \n", ["empty.txt", "is empty"]),
        ("marks.txt", b"<|endoftext|>\n<|endoftext|>", ["marks.txt", "no text"]),
        ("latin.txt", "caf\xe9".encode("latin1"), ["latin.txt", "byte 3", "0xe9", "iconv"]),
        ("binary.txt", b"ab\0cd", ["binary", "byte 2"]),
        ("bad.json", b"{", ["bad.json", "not JSON"]),
        ("object.json", b'{"text": "a"}', ["dict", "list"]),
        ("number.json", b"[3]", ["item 0", "int"]),
        ("keys.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ["line 2", "body"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text"\n', ["line 2", "not JSON"]),
        ("torn.txt.xz", lzma.compress(b"hello " * 1000)[:-9], ["torn.txt.xz", "xz"]),
        ("torn.txt.gz", b"\x1f\x8bnonsense", ["torn.txt.gz"]),
    ],
)
def test_bad_files_are_named_with_the_fix(tmp_path, name, data, words):
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(DataError) as error:
        read_documents(file)
    for word in words:
        assert word in str(error.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_documents(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="is a folder"):
        read_documents(tmp_path)
    with pytest.raises(DataError, match="No text files"):
        read_documents([])
