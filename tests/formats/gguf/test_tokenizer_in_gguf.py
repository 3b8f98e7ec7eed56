"""A tokenizer written to GGUF and read back splits real text as before; other vocabularies and damage are refused."""

from __future__ import annotations

import json

import gguf
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.data.documents import read_documents
from trilemma.formats.artifact import load_any
from trilemma.formats.gguf.write import write_gguf
from trilemma.model.gguf.pretokenizers import LLAMA3, QWEN2
from trilemma.model.gguf.tokenizer import gguf_tokenizer_files
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer

ODD = ["", " ", "  two  spaces ", "naïve café — 日本語 🎈", "tabs\tand\r\nlines\n\n\n", "don't I'LL we've 1234567 3.14",
       "x" * 300, "\u2581 looks like a space", "<s> </s> <|endoftext|> <unk>"]  # fmt: skip


def check_same(ours: Tokenizer, theirs: Tokenizer, texts: list[str]) -> None:
    assert ours.difference(theirs) is None
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids, text
        assert theirs.encode_plain(text) == ours.encode_plain(text), text
        assert theirs.decode(ids) == ours.decode(ids)


def round_trip(model: Model, path) -> tuple[Tokenizer, Tokenizer]:
    write_gguf(model, path)
    return Tokenizer.load(model.path), Tokenizer.load(path)


def test_the_shipped_models_tokenizer_comes_back(hearth_path, texts_path, tmp_path):
    texts = [document.text for document in read_documents(texts_path)][:12]
    check_same(*round_trip(load_any(hearth_path), tmp_path / "model.gguf"), texts + ODD)


@pytest.mark.shared
def test_a_sentencepiece_like_tokenizer_comes_back(shared_dir, tmp_path):
    stories = json.loads((shared_dir / "data" / "text" / "tinystories_1000.json").read_text(encoding="utf-8"))
    texts = [item if isinstance(item, str) else item["text"] for item in stories[:60]]
    check_same(*round_trip(load_any(shared_dir / "models" / "stories260K"), tmp_path / "model.gguf"), texts + ODD)


def model_with(tmp_path, fast, tiny_model, *, size=None) -> Model:
    """A small random Llama beside a tokenizer whose ids 1 and 0 begin and end a text."""
    small = tiny_model(vocab=size or len(fast.get_vocab(with_added_tokens=True)))
    fast.save(str(tmp_path / "tokenizer.json"))
    config = small.config.model_copy(update={"bos_token_id": 1, "eos_token_ids": (0,)})
    return Model(config, tiny_model(vocab=config.vocab_size).source, path=tmp_path)


def byte_level(pattern, texts, *, whole_words=False, digits=False, nfc=False):
    fast = FastTokenizer(models.BPE(ignore_merges=whole_words))
    own = pattern is None
    first = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        from tokenizers import Regex

        first = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    fast.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    fast.decoder = decoders.ByteLevel()
    if nfc:
        fast.normalizer = normalizers.NFC()
    special = ["<|end|>", "<|begin|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    )
    return fast


@pytest.mark.parametrize(
    "how",
    [{"pattern": LLAMA3, "whole_words": True}, {"pattern": LLAMA3}, {"pattern": QWEN2, "nfc": True},
     {"pattern": None, "digits": True}, {"pattern": None}],
    ids=["llama-bpe", "dbrx", "qwen2", "smollm", "gpt-2"],
)  # fmt: skip
def test_every_way_of_splitting_comes_back(how, texts_path, tmp_path, tiny_model):
    texts = [document.text for document in read_documents(texts_path)]
    fast = byte_level(how.pop("pattern"), texts[:20], **how)
    fast.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 1), ("<|end|>", 0)]
    )
    model = model_with(tmp_path, fast, tiny_model, size=704)  # four ids that the tokenizer does not use
    check_same(*round_trip(model, tmp_path / "model.gguf"), texts[20:30] + ODD)


def test_settings_and_template_come_back(tmp_path, tiny_model):
    model = model_with(tmp_path, byte_level(None, ["a text", "another"]), tiny_model)
    settings = {
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ours, theirs = round_trip(model, tmp_path / "model.gguf")
    asked = [{"role": "user", "content": "hello"}]
    assert theirs.chat(asked) == ours.chat(asked) == "<|begin|>hello"
    found = load_any(tmp_path / "model.gguf").config
    assert (found.bos_token_id, found.eos_token_ids) == (1, (0,))


def write_vocabulary(
    path, *, model="gpt2", pre="gpt-2", tokens=("a", "b", "ab"), merges=("a b",), types=None, scores=None
):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    if types is not None:
        writer.add_token_types(types)
    if merges:
        writer.add_token_merges(list(merges))
    if scores is not None:
        writer.add_token_scores(scores)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_way_of_splitting_that_is_not_known_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"'tekken'.*Known: .*gpt-2"):
        gguf_tokenizer_files(write_vocabulary(tmp_path / "m.gguf", pre="tekken"))


def test_a_kind_of_vocabulary_that_is_not_read_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        gguf_tokenizer_files(write_vocabulary(tmp_path / "m.gguf", model="bert"))


@pytest.mark.parametrize(
    "wrong",
    [{"types": [1, 1]}, {"merges": ("ab",)}, {"merges": ("a z",)}, {"merges": ()}, {"tokens": ()},
     {"model": "llama", "merges": ()}, {"model": "llama", "scores": [0.0]}],
)  # fmt: skip
def test_lists_that_do_not_fit_together_are_refused(wrong, tmp_path):
    with pytest.raises(CheckpointError):
        gguf_tokenizer_files(write_vocabulary(tmp_path / "m.gguf", **wrong))


def test_scores_decide_which_neighbours_are_joined(tmp_path):
    """SentencePiece joins the pair of the highest score first: 'bc' (-1) before 'ab' (-2), then nothing makes 'abc'."""
    tokens = ["<unk>", "a", "b", "c", "ab", "bc", "abc"]
    scores = [0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    path = write_vocabulary(
        tmp_path / "m.gguf", model="llama", tokens=tokens, scores=scores, types=[2, *[1] * 6], merges=()
    )
    fast = FastTokenizer.from_str(gguf_tokenizer_files(path)["tokenizer.json"])
    fast.normalizer = None
    assert fast.encode("abc", add_special_tokens=False).tokens == ["abc"]
    assert fast.encode("abb", add_special_tokens=False).tokens == ["ab", "b"]
    assert fast.encode("bcb", add_special_tokens=False).tokens == ["bc", "b"]
