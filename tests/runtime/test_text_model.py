"""Text in, text out: what is shown equals what the tokens say, whichever way it is asked."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

import trilemma
from trilemma.core.errors import CheckpointError, InputError
from trilemma.runtime.engine import SamplingSettings
from trilemma.runtime.text_model import open_text_model

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def hearth(hearth_path):
    with trilemma.open(hearth_path) as model:
        yield model


def test_text_tokens_and_pieces_agree(hearth):
    settings = SamplingSettings(max_tokens=30)
    pieces: list[str] = []
    answer = hearth.complete(PROMPT, settings, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    prompt = hearth.tokenizer.encode(PROMPT)
    assert hearth.tokenizer.decode(prompt + answer.tokens) == PROMPT + answer.text
    assert hearth.generate(PROMPT, max_tokens=30) == answer.text
    assert "".join(hearth.stream(PROMPT, max_tokens=30)) == answer.text
    assert answer.prompt_tokens == len(prompt)
    assert len(answer.token_times_s) == len(answer.tokens) == 30


def test_the_shipped_model_says_what_its_card_says(hearth):
    assert hearth.generate(PROMPT, max_tokens=25).startswith(", the little girl was sitting in a chair")


def test_a_stop_text_ends_and_is_not_shown(hearth):
    whole = hearth.generate(PROMPT, max_tokens=30)
    answer = hearth.complete(PROMPT, SamplingSettings(max_tokens=30), stop=["chair"])
    assert answer.finish_reason == "stop"
    assert answer.text == whole[: whole.index("chair")]


def test_times_are_consistent(hearth):
    answer = hearth.complete(PROMPT, SamplingSettings(max_tokens=8, ignore_eos=True))
    figures = answer.figures()
    assert figures["output_tokens"] == 8
    assert figures["decode_tokens_per_s"] == pytest.approx(1 / figures["tpot_s"])
    assert answer.ttft_s + 7 * answer.tpot_s == pytest.approx(answer.token_times_s[-1])
    assert "8 output tokens" in answer.summary()


def test_bad_requests_are_refused(hearth, tiny_model):
    with pytest.raises(InputError):
        hearth.generate("word " * 2000)
    with pytest.raises(ValidationError):
        hearth.generate(PROMPT, temprature=1)
    with pytest.raises(CheckpointError, match="chat template"):
        hearth.generate(PROMPT, chat=True)
    with pytest.raises(CheckpointError, match="tokenizer"):
        open_text_model(tiny_model())
