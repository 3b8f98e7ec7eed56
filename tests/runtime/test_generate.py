"""Text out of engines: stop strings across pieces, whole characters, a closed iterator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from trilemma.core.errors import InputError
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime.engine import Generation, SamplingSettings
from trilemma.runtime.generate import StopStrings, generate_text, generate_with_text


class _Scripted:
    """An engine that says the given tokens."""

    def __init__(self, tokens: list[int], error: Exception | None = None) -> None:
        self.tokens, self.error, self.said = tokens, error, 0

    def generate(
        self, prompt: Sequence[int], settings: SamplingSettings, on_token: Callable[[int], bool | None] | None = None
    ) -> Generation:
        if self.error is not None:
            raise self.error
        for count, token in enumerate(self.tokens, 1):
            self.said = count
            if on_token is not None and on_token(token) is False:
                return Generation(self.tokens[:count], "interrupted", len(prompt))
        return Generation(self.tokens, "length", len(prompt))


@pytest.fixture
def tokenizer(hearth_path) -> Tokenizer:
    return Tokenizer.load(hearth_path)


def _run(tokenizer: Tokenizer, text: str, stop: Sequence[str] = ()) -> tuple[str, Generation]:
    pieces: list[str] = []
    engine = _Scripted(tokenizer.encode_plain(text))
    done = generate_with_text(engine, tokenizer, [0], SamplingSettings(), pieces.append, stop)
    return "".join(pieces), done


def _pieces(text: str, generator) -> list[str]:
    cuts = sorted(int(cut) for cut in generator.integers(0, len(text) + 1, 12))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def test_stop_strings_equal_a_search_of_the_whole_text(random_generator):
    for _ in range(500):
        text = "".join(random_generator.choice(list("ab\n"), 30))
        stops = ["".join(random_generator.choice(list("ab\n"), int(random_generator.integers(1, 6)))) for _ in range(2)]
        watch = StopStrings(stops)
        shown = "".join(watch.push(piece) for piece in _pieces(text, random_generator)) + watch.flush()
        first = min((text.find(stop) for stop in stops if stop in text), default=len(text))
        # a piece may hold the end of a later, longer match before an earlier one is complete: never shown too far
        assert shown == text[: len(shown)]
        if first == len(text):
            assert shown == text
            assert watch.found is None
        else:
            assert watch.found in stops
            assert len(shown) <= text.find(watch.found)
            assert not any(stop in shown for stop in stops)


def test_text_is_held_back_only_while_undecided():
    watch = StopStrings(["</end>"])
    assert watch.push("a<") == "a"
    assert watch.push("/e") == ""
    assert watch.push("x") == "</ex"
    assert watch.push("</end> more") == ""
    assert watch.found == "</end>"
    assert watch.push("more") == ""


def test_whole_text_without_stops(tokenizer):
    text = "Once upon a time 😀 there was 日本."
    shown, done = _run(tokenizer, text)
    assert shown == text
    assert done.finish_reason == "length"


def test_stop_string_across_tokens(tokenizer):
    shown, done = _run(tokenizer, "one two three four", ["o three", "four"])
    assert shown == "one tw"
    assert done.finish_reason == "stop"
    assert tokenizer.decode(done.tokens) == "one two three"


def test_stop_string_that_only_begins(tokenizer):
    shown, done = _run(tokenizer, "one two thr", ["three"])
    assert shown == "one two thr"
    assert done.finish_reason == "length"


def test_iterator_gives_the_same_text(tokenizer):
    engine = _Scripted(tokenizer.encode_plain(" there was 😀 END not this"))
    assert "".join(generate_text(engine, tokenizer, "Once", stop=["END"])) == " there was 😀 "


def test_closing_the_iterator_stops_the_engine(tokenizer):
    engine = _Scripted(tokenizer.encode_plain("word ") * 100_000)
    pieces = generate_text(engine, tokenizer, "Once")
    next(pieces)
    pieces.close()
    assert engine.said < 100_000 * 2
    assert not any(thread.name == "trilemma-generate" for thread in threading.enumerate())


def test_errors_reach_the_caller(tokenizer):
    with pytest.raises(InputError, match="too long"):
        list(generate_text(_Scripted([], InputError("too long")), tokenizer, "Once"))
