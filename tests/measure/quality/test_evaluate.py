"""Texts, tasks and answers through one call, on the shipped model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from trilemma.core.errors import DataError, InputError
from trilemma.formats.artifact import load_any
from trilemma.measure.quality.evaluate import evaluate, evaluate_all
from trilemma.measure.quality.texts import bos_of, read_token_set
from trilemma.measure.results import EvaluateResult
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions

ONE = EngineOptions(threads=1)


@pytest.fixture
def task(tmp_path):
    rows = [
        {"query": "The king sat on his", "choices": ["throne.", "of of the."], "gold": 0},
        {"query": "She opened the door and", "choices": ["went in.", "zebra quantum."], "gold": 0},
    ]
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_everything_against_itself_changes_nothing(hearth_path, texts_path, task):
    found = evaluate(
        hearth_path, texts_path, reference=hearth_path, context=64, stride=32, max_tokens=500, tasks={"small": task},
        generate=4, answer_tokens=12, options=EngineOptions(threads=1, kv_cache="f32"),
    )  # fmt: skip
    assert EvaluateResult.model_validate_json(found.model_dump_json()) == found
    assert (found.stride, found.protocol) == (32, "windows")
    (row,) = found.tasks
    assert row.measurements["accuracy/small"].value == 1
    assert (row.gained, row.lost) == (0, 0)
    assert row.measurements["accuracy_change/small"].value == 0
    assert row.measurements["accuracy/small"].conditions["context"] == 512  # the model's own, not the windows'
    written = found.generation
    assert written.measurements["changed_answers"].value == 0
    assert written.measurements["agreed_tokens"].value == written.measurements["answer_tokens"].value
    assert written.answers[0].answer == written.answers[0].reference
    assert found.rows[0].measurements["kl_mean"].value < 1e-6


def test_tasks_alone_need_no_text_and_stop_at_a_limit(hearth_path, task):
    found = evaluate(hearth_path, tasks={"small": task}, limit_items=1, options=ONE)
    assert found.rows == ()
    assert found.tasks[0].items == 1
    two = evaluate_all([hearth_path, hearth_path], tasks={"small": task}, options=ONE)
    assert two[0].tasks == two[1].tasks


def test_llama_cpp_perplexity_is_that_of_its_loop(hearth_path, tmp_path):
    """The tool's arithmetic over the engine's own logits, windows cut by hand from the file as it stands."""
    text = " The first line.\n\nThe second one goes on and on.\n" * 40
    (tmp_path / "text.txt").write_text(text)
    found = evaluate(hearth_path, tmp_path / "text.txt", context=32, protocol="llama.cpp", options=ONE).rows[0]
    tokenizer = Tokenizer.load(hearth_path)
    ids = tokenizer.encode(text[:-1])
    assert ids[0] == bos_of(tokenizer)[0]
    engine = open_engine(load_any(hearth_path), options=ONE)
    nll = []
    for chunk in range(len(ids) // 32):
        window = [ids[0], *ids[chunk * 32 + 1 : chunk * 32 + 32]]
        logits = engine.logits(window).astype(np.float64)
        for at in range(16, 31):
            nll.append(np.logaddexp.reduce(logits[at]) - logits[at][window[at + 1]])
    engine.close()
    assert found.tokens == len(nll)
    assert found.documents == len(ids) // 32
    assert found.measurements["perplexity"].value == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)


def test_texts_of_documents_are_joined_for_llama_cpp(hearth_path, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "a line of text. " * 30}) + "\n" for _ in range(4)))
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(["a line of text. " * 30] * 4))
    model = load_any(hearth_path)
    sets = [
        read_token_set(model, tmp_path / name, 64, None, "none", protocol="llama.cpp") for name in ("a.jsonl", "b.txt")
    ]
    assert [np.array_equal(x, y) for x, y in zip(*(item.windows for item in sets), strict=True)] == [True] * len(
        sets[0].windows
    )


def test_what_makes_no_sense_is_refused(hearth_path, texts_path, task):
    with pytest.raises(DataError, match="text or tasks"):
        evaluate(hearth_path)
    with pytest.raises(InputError, match="leave the stride out"):
        evaluate(hearth_path, texts_path, protocol="llama.cpp", stride=4, context=64)
    with pytest.raises(DataError, match="stride of 65"):
        evaluate(hearth_path, texts_path, stride=65, context=64)
    with pytest.raises(InputError, match="no texts"):
        evaluate(hearth_path, tasks={"small": task}, generate=2)
    with pytest.raises(InputError, match="at most half"):
        evaluate(hearth_path, texts_path, generate=2, answer_tokens=40, context=64)
