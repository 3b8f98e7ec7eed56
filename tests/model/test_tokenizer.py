"""Tokenization against transformers and against the tokenizers package, streaming, chat templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trilemma.core.errors import CheckpointError, InputError
from trilemma.model.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = [
    "Once upon a time", "", "two  spaces\n\nand lines", "naïve café — “quotes”", "emoji 😀 and 🧙‍♀️, 日本語",
    "tabs\tand\r\nreturns", "12345 + 67.8 = ?", "x" * 300, "mixed ÄÖÜ ß end ",
]  # fmt: skip
MODELS = ["stories260K", "hearth-7m"]


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "hearth-7m":
        return request.getfixturevalue("hearth_path")
    return request.getfixturevalue("shared_dir") / "models" / request.param


@pytest.mark.shared
@pytest.mark.parametrize("name", MODELS)
def test_ids_equal_transformers(name, shared_dir):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = shared_dir / "models" / name
    ours = Tokenizer.load(path)
    for theirs in (
        AutoTokenizer.from_pretrained(path),
        PreTrainedTokenizerFast(tokenizer_file=f"{path}/tokenizer.json"),
    ):
        for text in TEXTS:
            assert ours.encode(text) == theirs(text)["input_ids"]
            assert ours.encode_plain(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_bos_is_added_once_by_the_post_processor(folder):
    tokenizer = Tokenizer.load(folder)
    config = json.loads((folder / "config.json").read_text())
    for text in TEXTS:
        assert tokenizer.encode(text) == [config["bos_token_id"], *tokenizer.encode_plain(text)]


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        ({"add_bos_token": True, "bos_token": "<|endoftext|>"}, [0]),
        ({"add_bos_token": True, "bos_token": {"content": "<|endoftext|>"}}, [0]),
        ({"add_bos_token": True}, []),
        ({"add_bos_token": False, "bos_token": "<|endoftext|>"}, []),
        ({"bos_token": "<|endoftext|>"}, []),
    ],
)
def test_bos_without_a_post_processor(hearth_path, tmp_path, settings, added):
    raw = json.loads((hearth_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**raw, "post_processor": None}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("Once") == added + tokenizer.encode_plain("Once")


def test_round_trip_and_size(folder):
    tokenizer = Tokenizer.load(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == json.loads((folder / "config.json").read_text())["vocab_size"]
    with pytest.raises(InputError, match="Token ids must lie in"):
        tokenizer.decode([-1])


def _stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    stream = tokenizer.stream(prompt)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_stream_joins_to_the_whole_text(folder, text):
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(text)
    pieces = _stream(tokenizer, ids, [])
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_after_a_prompt_keeps_the_leading_space(folder):
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("Once upon a time there was 日本")
    prompt = tokenizer.encode("Once upon a time")
    assert ids[: len(prompt)] == prompt
    assert "".join(_stream(tokenizer, ids[len(prompt) :], prompt)) == " there was 日本"


def test_stream_of_random_ids_equals_decode(folder, random_generator):
    tokenizer = Tokenizer.load(folder)
    # a run of byte tokens that is no UTF-8 is decoded as a whole, which no stream can foresee: left out
    usable = [i for i in range(tokenizer.vocab_size) if not tokenizer.decode([i]).endswith("\ufffd")]
    usable = [i for i in usable if tokenizer.token_id(f"<0x{i - 3:02X}>") != i]
    for _ in range(30):
        ids = random_generator.choice(usable, 60).tolist()
        cut = int(random_generator.integers(0, 10))
        pieces = _stream(tokenizer, ids[cut:], ids[:cut])
        whole = tokenizer.decode(ids)
        assert "".join(pieces) == whole[len(tokenizer.decode(ids[:cut])) :]


def test_half_a_character_waits_for_the_rest(hearth_path):
    tokenizer = Tokenizer.load(hearth_path)
    ids = tokenizer.encode_plain("😀")
    assert len(ids) > 2
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["😀"]
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_missing_and_broken_files(tmp_path, hearth_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json\. Copy"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model.*Convert it"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can not be read"):
        Tokenizer.load(tmp_path)
    shutil.copy(hearth_path / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json can not be read"):
        Tokenizer.load(tmp_path)


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ message.role }}>\n    {% if loop.first %}first{% endif %}\n{{ message.content | trim }}{{ message | tojson }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "system", "content": " be kind "}, {"role": "user", "content": "Hallo <b>ö</b>"}]


def _with_template(hearth_path: Path, tmp_path: Path, template: Any, file: bool) -> Tokenizer:
    shutil.copy(hearth_path / "tokenizer.json", tmp_path)
    settings = json.loads((hearth_path / "tokenizer_config.json").read_text())
    if file:
        (tmp_path / "chat_template.jinja").write_text(template)
    else:
        settings["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("file", [True, False])
@pytest.mark.parametrize("generate", [True, False])
def test_chat_equals_transformers(hearth_path, tmp_path, file, generate):
    from transformers import AutoTokenizer

    ours = _with_template(hearth_path, tmp_path, TEMPLATE, file)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=generate)
    assert ours.chat(MESSAGES, add_generation_prompt=generate) == expected


def test_chat_templates_that_fail(hearth_path, tmp_path):
    with pytest.raises(CheckpointError, match="no chat template"):
        Tokenizer.load(hearth_path).chat(MESSAGES)
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "{{ messages | length }}"}]
    assert _with_template(hearth_path, tmp_path, named, False).chat(MESSAGES) == "2"
    refusing = _with_template(hearth_path, tmp_path, TEMPLATE, False)
    with pytest.raises(InputError, match="no tools"):
        refusing.chat([{"role": "tool", "content": ""}])
    for bad in ("{% for %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ missing.field }}"):
        with pytest.raises(CheckpointError, match="chat template can not be used"):
            _with_template(hearth_path, tmp_path, bad, False).chat(MESSAGES)


def test_whole_vocabulary_decodes(hearth_path):
    tokenizer = Tokenizer.load(hearth_path)
    ids = np.arange(tokenizer.vocab_size).tolist()
    assert len(tokenizer.decode(ids)) > tokenizer.vocab_size
