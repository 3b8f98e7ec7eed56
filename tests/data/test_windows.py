"""Token windows: nothing lost, nothing across documents, bytes accounted for."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import DataError
from trilemma.data.documents import Document
from trilemma.data.windows import TokenSet, make_windows, sample_calibration


def encode(text):
    return [ord(char) for char in text]


def decode(ids):
    return "".join(chr(item) for item in ids)


def documents(lengths, domain="d"):
    return [
        Document("".join(chr(0x41 + (index * 7 + at) % 400) for at in range(length)), domain, f"{domain}{index}")
        for index, length in enumerate(lengths)
    ]


def test_windows_cover_each_document_once():
    given = documents([10, 0, 1, 23, 8])
    found = make_windows(given, encode, 8, decode=decode)
    assert [window.tolist() for window in found.windows] == [
        encode(given[index].text)[start : start + 8]
        for index, start in [(0, 0), (0, 8), (3, 0), (3, 8), (3, 16), (4, 0)]
    ]
    assert found.documents.tolist() == [0, 0, 1, 1, 1, 2]
    assert found.sources == ("d0", "d3", "d4")
    assert found.tokens == 10 + 23 + 8
    assert found.predicted_tokens == found.tokens - 6
    expected = [len(decode(window[1:]).encode()) for window in found.windows]
    assert found.text_bytes.tolist() == expected


def test_a_lone_last_token_is_no_window():
    found = make_windows(documents([9]), encode, 8)
    assert [len(window) for window in found.windows] == [8]


def test_bytes_without_decode_are_close():
    given = documents([400, 300])
    exact = make_windows(given, encode, 50, decode=decode).text_bytes.sum()
    shared = make_windows(given, encode, 50).text_bytes.sum()
    assert shared == pytest.approx(exact, rel=0.02)


def test_limit_spreads_over_documents_or_fills_from_the_first():
    given = documents([100, 100, 100, 100])
    wide = make_windows(given, encode, 10, 60)
    assert np.bincount(wide.documents).tolist() == [2, 2, 1, 1]
    assert wide.tokens == 60
    deep = make_windows(given, encode, 10, 60, spread=False)
    assert deep.document_count == 1
    assert deep.tokens == 60


def test_hash_and_selection():
    found = make_windows(documents([40], "a") + documents([40, 40], "b"), encode, 8)
    assert found.hash == make_windows(documents([40], "a") + documents([40, 40], "b"), encode, 8).hash
    assert found.hash != found.first(3).hash
    part = found.of_domain("b")
    assert part.domains == ("b", "b")
    assert TokenSet.joined([found.of_domain("a"), part]).hash == found.hash
    assert TokenSet.joined([found.of_domain("a"), part]).documents.tolist() == found.documents.tolist()


def test_nothing_to_predict_is_an_error():
    with pytest.raises(DataError, match="fewer than two tokens"):
        make_windows(documents([1, 1]), encode, 8)
    with pytest.raises(DataError, match="at least 2"):
        make_windows(documents([10]), encode, 1)


def test_calibration_windows_are_full_seeded_and_from_the_text():
    given = documents([130, 45, 77, 200])
    found = sample_calibration(given, encode, 16, 12, seed=3)
    assert found.shape == (12, 16)
    assert found.dtype == np.int32
    assert np.array_equal(found, sample_calibration(given, encode, 16, 12, seed=3))
    assert not np.array_equal(found, sample_calibration(given, encode, 16, 12, seed=4))
    texts = [document.text for document in given]
    assert all(any(decode(row) in text for text in texts) for row in found)
    assert len({decode(row) for row in found}) == 12


def test_short_documents_are_joined_and_too_little_text_is_an_error():
    assert sample_calibration(documents([9, 9, 9, 9]), encode, 16, 8).shape == (2, 16)
    with pytest.raises(DataError, match="fewer than 16 tokens"):
        sample_calibration(documents([5, 5]), encode, 16, 8)
