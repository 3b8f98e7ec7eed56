"""Token windows: nothing lost, nothing across documents, bytes accounted for."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import DataError
from trilemma.data.calibration import sample_calibration
from trilemma.data.documents import Document
from trilemma.data.llama_cpp_windows import llama_cpp_windows
from trilemma.data.windows import TokenSet, count_words, make_windows


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


def positions(found: TokenSet, starts: list[int]) -> list[int]:
    """Places of the scored tokens in their document, window by window."""
    places = []
    for index, (window, start) in enumerate(zip(found.windows, starts, strict=True)):
        end = start + len(window)
        places += range(end - len(found.targets(index)), end)
    return places


@pytest.mark.parametrize("length", [2, 7, 8, 9, 13, 40, 41, 83])
@pytest.mark.parametrize("stride", [1, 3, 5, 7])
def test_with_a_stride_every_token_is_scored_once_with_context(length, stride):
    """The loop of the transformers documentation, written anew, is the oracle."""
    (given,) = documents([length])
    found = make_windows([given], encode, 8, stride=stride, decode=decode)
    windows, targets, before = [], [], 0
    for begin in range(0, length, stride):
        end = min(begin + 8, length)
        windows.append(encode(given.text)[begin:end])
        targets.append(encode(given.text)[max(before, begin + 1) : end])
        before = end
        if end == length:
            break
    assert [window.tolist() for window in found.windows] == windows
    assert [found.targets(index).tolist() for index in range(len(windows))] == targets
    assert positions(found, list(range(0, stride * len(windows), stride))) == list(range(1, length))
    assert found.text_bytes.sum() == len(given.text[1:].encode())
    assert found.stride == stride


def test_a_stride_of_the_context_is_no_overlap_and_others_are_refused():
    given = documents([30, 17])
    assert make_windows(given, encode, 8, stride=8).hash == make_windows(given, encode, 8).hash
    for stride in (0, 9, -1):
        with pytest.raises(DataError, match="stride"):
            make_windows(given, encode, 8, stride=stride)


def test_a_limit_counts_overlaps_once():
    given = documents([100, 100, 100, 100])
    found = make_windows(given, encode, 10, 60, stride=4)
    assert found.predicted_tokens == 60 - 4  # each document's first is context only
    assert found.document_count == 4
    assert make_windows(given, encode, 10, stride=4).predicted_tokens == 4 * 99


def test_what_is_scored_is_part_of_the_identity():
    given = documents([40, 40])
    plain, overlapping = make_windows(given, encode, 8), make_windows(given, encode, 8, stride=4)
    unscored = TokenSet(plain.windows, plain.documents, plain.text_bytes, 8, plain.sources, plain.domains,
                        np.ones(len(plain.windows), np.int64))  # fmt: skip
    assert len({plain.hash, overlapping.hash, unscored.hash}) == 3
    assert overlapping.take(np.arange(len(overlapping.windows))).hash == overlapping.hash
    parts = [make_windows([item], encode, 8, stride=4) for item in given]
    assert TokenSet.joined(parts).hash == overlapping.hash
    with pytest.raises(ValueError, match="strides"):
        TokenSet.joined([plain, overlapping])


def test_words_are_counted_as_lm_eval_counts_them():
    assert count_words("one two  three\nfour") == 4
    given = [Document("the cat sat on a mat by the door", "d", "1")]
    whole = make_windows(given, encode, 64, decode=decode)
    assert whole.text_words.tolist() == [8]  # the first letter's word was begun by context
    cut = make_windows(given, encode, 8, stride=3, decode=decode)
    assert cut.text_words.sum() == 8
    assert make_windows(given, encode, 64).text_words.sum() == pytest.approx(9, rel=0.05)


@pytest.mark.parametrize(("length", "context"), [(16, 8), (31, 8), (47, 9), (100, 11)])
@pytest.mark.parametrize("bos", [[], [1]])
def test_the_windows_of_llama_cpp(length, context, bos):
    """Chunks, the BOS in place of a token, and the scored places as the tool's loop has them."""
    (given,) = documents([length])
    found = llama_cpp_windows(given.text + "\n", encode, context, bos=bos, decode=decode)
    tokens = bos + encode(given.text)
    first, targets, windows = context // 2, [], []
    for chunk in range(len(tokens) // context):
        start = chunk * context
        windows.append((bos or tokens[start : start + 1]) + tokens[start + 1 : start + context])
        targets.append([tokens[start + first + at + 1] for at in range(context - 1 - first)])
    assert [window.tolist() for window in found.windows] == windows
    assert [found.targets(index).tolist() for index in range(len(windows))] == targets
    assert found.predicted_tokens == len(windows) * (context - first - 1)
    assert found.document_count == len(windows)
    assert found.protocol == "llama.cpp"


def test_llama_cpp_refuses_less_than_two_windows_and_stops_at_a_limit():
    (given,) = documents([100])
    with pytest.raises(DataError, match="at least two windows"):
        llama_cpp_windows(given.text[:15], encode, 8, decode=decode)
    with pytest.raises(DataError, match="at least 4"):
        llama_cpp_windows(given.text, encode, 3, decode=decode)
    assert len(llama_cpp_windows(given.text, encode, 8, 39, decode=decode).windows) == 4
