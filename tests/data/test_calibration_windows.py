"""What calibration sees: mixtures in proportion, conversations whole, and the tokens that old recipes promise."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from trilemma.core.errors import CheckpointError, DataError
from trilemma.core.recipe import Calibration, Recipe
from trilemma.data.calibration import conversation_pieces, sample_calibration
from trilemma.data.documents import Document, read_documents
from trilemma.data.text_source import read_sources
from trilemma.formats.artifact import load_any
from trilemma.model.tokenizer import Tokenizer
from trilemma.techniques.calibration_text import read_calibration

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # after Llama 3: a date, a system message of its own, tools, and a refusal
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set own = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set own = '' %}{% set rest = messages %}{% endif %}"
    "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.\n"
    "{% if tools %}{% for tool in tools %}{{ tool | tojson(indent=4) }}\n{% endfor %}{% endif %}{{ own }}<|im_end|>"
    "{% for message in rest %}{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('odd role') }}"
    "{% endif %}<|im_start|>{{ message.role }}\n\n{% generation %}{{ message.content | trim }}{% endgeneration %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
WORDS = ["the", "fox", "and", "her", "cubs", "went", "over", "a", "snowy", "hill", "to", "see", "far", "said", "Anna"]


@pytest.fixture
def chat_folder(hearth_path, tmp_path) -> Path:
    """The shipped tokenizer with two special tokens more, without its template."""
    folder = tmp_path / "chat"
    folder.mkdir()
    raw = json.loads((hearth_path / "tokenizer.json").read_text())
    for number, token in enumerate(("<|im_start|>", "<|im_end|>")):
        raw["added_tokens"].append({
            "id": 8192 + number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        })  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_bytes((hearth_path / "tokenizer_config.json").read_bytes())
    return folder


def conversations(rng: np.random.Generator, count: int, words: int = 12, turns: int = 6) -> list[list[dict[str, str]]]:
    def say() -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(1, words + 1))))

    found = []
    for number in range(count):
        opening = [{"role": "system", "content": f"Rule {number}: {say()}"}] if number % 3 == 0 else []
        talk = [
            {"role": ("user", "assistant")[at % 2], "content": say()} for at in range(2 * int(rng.integers(1, turns)))
        ]
        found.append([*opening, *talk])
    return found


def write_rows(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", [CHATML, HEADERS])
def test_conversations_are_the_tokens_that_transformers_makes(chat_folder, tmp_path, random_generator, template):
    transformers = pytest.importorskip("transformers")
    talks = conversations(random_generator, 20)
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"ä": ["<b>", 1.5]}}}]
    file = write_rows(tmp_path / "talk.jsonl", [{"messages": talk, "tools": tools} for talk in talks])
    (chat_folder / "chat_template.jinja").write_text(template)
    ours = Tokenizer.load(chat_folder)
    documents = read_documents(file, render=lambda messages, tools: ours.chat(
        messages, add_generation_prompt=False, tools=tools
    ))  # fmt: skip
    theirs = transformers.AutoTokenizer.from_pretrained(chat_folder)
    for document, talk in zip(documents, talks, strict=True):
        expected = theirs.apply_chat_template(talk, tools=tools, tokenize=True, return_dict=False)
        assert ours.encode_plain(document.text) == expected
        heads = [theirs.apply_chat_template(talk[:at], tools=tools, tokenize=False) for at in range(1, len(talk))]
        assert document.turns == (0, *(len(head) for head in heads))


def test_parts_of_text_are_joined_and_the_date_stands_still(chat_folder, tmp_path):
    (chat_folder / "chat_template.jinja").write_text(HEADERS)
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]
    file = write_rows(tmp_path / "talk.jsonl", [{"messages": [{"role": "user", "content": parts}]}])
    found = read_documents(file, render=Tokenizer.load(chat_folder).transcript, prepare="book")
    assert "One two<|im_end|>" in found[0].text
    assert "Today is 26 Jul 2024." in found[0].text
    assert "user\n\nOne" in found[0].text  # 'book' leaves conversations alone


def contains(window: list[int], piece: list[int]) -> bool:
    return any(window[at : at + len(piece)] == piece for at in range(len(window) - len(piece) + 1))


@pytest.mark.parametrize("context", [40, 64, 129])
def test_conversations_that_fit_are_whole_in_a_window(chat_folder, tmp_path, random_generator, context):
    (chat_folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = Tokenizer.load(chat_folder)
    talks = conversations(random_generator, 60)
    documents = read_documents(
        write_rows(tmp_path / "talk.jsonl", [{"messages": talk} for talk in talks]), render=tokenizer.transcript
    )
    windows = sample_calibration(
        documents, tokenizer.encode, context, 10_000, seed=5, encode_chat=tokenizer.encode_plain
    ).tolist()
    start = tokenizer.token_id("<|im_start|>")
    roles = {tokenizer.encode_plain(role)[0] for role in ("system", "user", "assistant")}
    whole = [tokenizer.encode_plain(document.text) for document in documents]
    missed = [ids for ids in whole if len(ids) <= context and not any(contains(window, ids) for window in windows)]
    assert sum(map(len, missed)) < context  # what was still held when the text ended
    assert context > 40 or any(len(ids) > context for ids in whole)
    if all(len(message) <= context - 5 for message in _messages(talks, tokenizer)):
        assert all(window[0] == start and window[1] in roles for window in windows)


def _messages(talks: list[list[dict[str, str]]], tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode_plain(message["content"]) for talk in talks for message in talk]


def test_long_conversations_are_cut_between_messages():
    text = "[aaaa][bb][cccccc][d][" + "e" * 13 + "][ff]"
    starts = tuple(at for at, letter in enumerate(text) if letter == "[")
    pieces = conversation_pieces(Document(text, "d", "s", turns=starts), lambda part: [ord(x) for x in part], 10)
    shown = ["".join(map(chr, piece)) for piece in pieces]
    assert shown == ["[aaaa][bb]", "[cccccc]", "[d]", "[eeeeeeeee", "eeee]", "[ff]"]


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def texts(*sizes: tuple[str, int, int]) -> list[Document]:
    """(letter, documents, letters each) a file."""
    return [
        Document(letter * length, letter, f"{letter}{number}", file)
        for file, (letter, count, length) in enumerate(sizes)
        for number in range(count)
    ]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (6, 1), (0.05, 0.9, 0.05), (5, 3, 1), (1e-6, 1)])
@pytest.mark.parametrize("count", [7, 64, 101])
def test_every_beginning_of_a_mixture_is_in_proportion(weights, count):
    given = texts(*((letter, 9, 400) for letter in "abc"[: len(weights)]))
    sources = read_sources([f"{name}.txt:{weight}" for name, weight in zip("abc", weights, strict=False)])
    windows = sample_calibration(given, letters, 16, count, seed=2, sources=sources)
    assert len(windows) == count
    assert all(len(set(window)) == 1 for window in windows.tolist())
    for end in range(len(weights), count + 1):
        held = Counter(chr(window[0]) for window in windows[:end])
        for name, weight in zip("abc", weights, strict=False):
            assert abs(held[name] - max(1, end * weight / sum(weights))) < 2


def test_mixtures_are_drawn_by_seed_and_file_order_within_a_file():
    rng = np.random.default_rng(0)
    given = [Document("".join(map(chr, rng.integers(97, 123, 300))), "d", f"s{n}", n % 2) for n in range(12)]
    sources = read_sources(["a:2", "b:1"])
    first = sample_calibration(given, letters, 16, 30, seed=1, sources=sources)
    assert np.array_equal(first, sample_calibration(given, letters, 16, 30, seed=1, sources=sources))
    assert not np.array_equal(first, sample_calibration(given, letters, 16, 30, seed=2, sources=sources))
    assert len({bytes(window) for window in first}) == 30


def test_a_text_too_short_for_its_share_keeps_the_proportions():
    given = texts(("a", 5, 160), ("b", 1, 48))  # 50 and 3 windows of 16
    windows = sample_calibration(given, letters, 16, 40, sources=read_sources(["a:3", "b:1"]))
    held = Counter(chr(window[0]) for window in windows)
    assert held["b"] == 3
    assert 9 <= held["a"] <= 11
    with pytest.raises(DataError, match=r"'b' has fewer than 16 tokens"):
        sample_calibration(texts(("a", 5, 160), ("b", 1, 5)), letters, 16, 8, sources=read_sources(["a:3", "b:1"]))
    with pytest.raises(DataError, match="1 windows can not hold 2 texts"):
        sample_calibration(given, letters, 16, 1, sources=read_sources(["a:3", "b:1"]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, ["no messages"]),
        ({"messages": [{"content": "a"}]}, ["message 1", "role"]),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, ["message 2", "role"]),
        ({"messages": [{"role": "user", "content": None}]}, ["message 1", "NoneType", "text"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["message 1", "image_url"]),
        ({"messages": [{"role": "cook", "content": "a"}]}, ["odd role", "Mend"]),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "none"}, ["tools", "str"]),
    ],
)
def test_conversations_that_can_not_be_used_are_named(chat_folder, tmp_path, row, words):
    (chat_folder / "chat_template.jinja").write_text(HEADERS)
    file = write_rows(tmp_path / "talk.jsonl", [{"text": "plain"}, row])
    with pytest.raises(DataError) as error:
        read_documents(file, render=Tokenizer.load(chat_folder).transcript)
    for word in ["talk.jsonl", "line 2", *words]:
        assert word in str(error.value)


def test_chat_without_a_template_is_named(hearth_path, tmp_path):
    file = write_rows(tmp_path / "talk.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(CheckpointError, match=r"talk\.jsonl' line 1 holds chat messages\. This model has no chat"):
        read_documents(file, render=Tokenizer.load(hearth_path).transcript)
    with pytest.raises(DataError, match="not read here"):
        read_documents(file)


def test_old_recipes_see_the_same_tokens(hearth_path, texts_path):
    """Hashes of the tokens that the first release drew from the shipped text."""
    model = load_any(hearth_path)
    adults = texts_path.with_name("adults.txt")
    found, record = read_calibration(model, [texts_path], 3)
    assert found.shape == (128, 512)
    assert record.sha256 == "87748615c63d57e0"
    assert read_calibration(model, [texts_path, adults], 5, prepare="book")[1].sha256 == "d5645732ea197001"
    old = "{part: calibrate, windows: 128, context: 512, seed: 5, prepare: book, sha256: 6bba5b1ea4a99aa7}"
    recipe = Recipe.from_yaml(f"version: 1\nname: W4A8-g32-gptq\nsteps: []\ncalibration: {old}\n")
    assert recipe.hash == "8b4c269eefa76193"
    assert recipe.calibration is not None
    read_calibration(model, [texts_path], 0, record=recipe.calibration)


def test_a_mixture_is_replayed_from_its_recipe(hearth_path, texts_path):
    model, adults = load_any(hearth_path), texts_path.with_name("adults.txt")
    found, record = read_calibration(model, [f"{texts_path}:0.25", f"{adults}:0.75"], 7)
    assert record.weights == (0.25, 0.75)
    again = Recipe.from_yaml(Recipe(calibration=record).to_yaml()).calibration
    assert again == record
    for data in ([texts_path, adults], [f"{texts_path}:0.25", f"{adults}:0.75"]):
        assert np.array_equal(read_calibration(model, data, 0, record=again)[0], found)
    with pytest.raises(DataError, match="other calibration text"):
        read_calibration(model, [adults, texts_path], 0, record=again)
    assert Calibration.model_validate(record.model_dump(exclude={"weights"})).weights is None
