"""A GGUF vocabulary as tokenizer.json: byte-level BPE ('gpt2') and BPE with byte fallback ('llama', SentencePiece).

SentencePiece's vocabularies carry scores instead of merges: of two neighbours those are joined whose joint piece
has the highest score. The merges are every split of a piece into two others, ordered by the piece's score. What
llama.cpp splits in another way than is known here is refused by name rather than guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.model.gguf import pretokenizers
from trilemma.model.gguf.header import GgufHeader, read_gguf_arrays, read_gguf_header

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_PREFIX = "tokenizer.ggml."
_LISTS = ("tokens", "token_type", "scores", "merges")
_SPACE = "▁"
_LONGEST_PIECE = 256  # a longer one is not searched for splits


def padding(index: int) -> str:
    """The text that stands for an id which the tokenizer does not use."""
    return f"[PAD{index}]"


def gguf_tokenizer_files(path: Path) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json of a GGUF file; nothing where it carries no vocabulary.

    Raises:
        CheckpointError: lists that do not fit together. UnsupportedModelError: a kind of vocabulary that is not read.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(f"Can not read '{path}': {error.strerror or error}.") from None
    return dict(_translate(path, state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=4)
def _translate(path: Path, _changed_ns: int, _size: int) -> Mapping[str, str]:
    header = read_gguf_header(path)
    kind = header.metadata.get(_PREFIX + "model", "no_vocab")
    if kind in ("no_vocab", "none"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"'{path}' has a vocabulary of the kind '{kind}'; gpt2 and llama are read. "
            "Start from the Hugging Face folder that the file was made from."
        )
    lists = read_gguf_arrays(path, [_PREFIX + name for name in _LISTS])
    found = {name: lists.get(_PREFIX + name) for name in _LISTS}
    tokens, types = _checked(path, found)
    raw = (_byte_level if kind == "gpt2" else _sentencepiece)(path, header, tokens, types, found)
    _check_buildable(path, raw)
    return {
        "tokenizer.json": json.dumps(raw, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_settings(header, tokens), ensure_ascii=False, indent=1),
    }


def _checked(path: Path, found: Mapping[str, list[Any] | None]) -> tuple[list[str], list[int]]:
    tokens = found["tokens"]
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"'{path}' has no list of tokens: the file is damaged.")
    types = found["token_type"] or [NORMAL] * len(tokens)
    scores = found["scores"]
    if len(types) != len(tokens) or (scores is not None and len(scores) != len(tokens)):
        raise CheckpointError(f"'{path}' has {len(tokens)} tokens, but not as many types or scores: it is damaged.")
    return tokens, types


def _byte_level(
    path: Path, header: GgufHeader, tokens: list[str], types: list[int], found: Mapping[str, list[Any] | None]
) -> dict[str, Any]:
    name = str(header.metadata.get(_PREFIX + "pre", "default"))
    if name not in pretokenizers.KNOWN:
        raise UnsupportedModelError(
            f"'{path}' splits text in the way '{name}', which is not known here. Known: "
            f"{', '.join(pretokenizers.KNOWN)}. Start from the Hugging Face folder that the file was made from."
        )
    merges = found["merges"]
    if merges is None or not all(isinstance(item, str) and " " in item[1:] for item in merges):
        raise CheckpointError(f"'{path}' has no merges, or damaged ones.")
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": name in pretokenizers.WHOLE_WORDS,
        "vocab": _vocabulary(tokens, types),
        "merges": [_split_merge(item) for item in merges],
    }  # fmt: skip
    normalizer = {"type": "NFC"} if name == "qwen2" else None
    default_bos = name in pretokenizers.ADD_BOS
    return _document(header, tokens, types, model, normalizer, pretokenizers.pre_tokenizer(name), level, default_bos)


def _sentencepiece(
    path: Path, header: GgufHeader, tokens: list[str], types: list[int], found: Mapping[str, list[Any] | None]
) -> dict[str, Any]:
    scores = found["scores"]
    if scores is None:
        raise CheckpointError(f"'{path}' has no scores, which a vocabulary of the kind 'llama' needs.")
    unknown = next((text for text, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    model = {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": BYTE in types, "ignore_merges": False,
        "vocab": _vocabulary(tokens, types), "merges": _merges(tokens, types, scores),
    }  # fmt: skip
    prefix = header.metadata.get(_PREFIX + "add_space_prefix", True) is True
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    first = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    normalizer = {"type": "Sequence", "normalizers": [*first, replace]}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    return _document(header, tokens, types, model, normalizer, None, decoder, True)


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Text -> id without padding; added tokens too, which would get other ids if they were not in it."""
    return {
        text: index
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if not (kind == UNUSED and text == padding(index))
    }


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
    ids = {text: index for index, text in enumerate(tokens) if types[index] in (NORMAL, UNUSED)}
    found: list[tuple[float, int, int, str, str]] = []
    for text, index in ids.items():
        if 1 < len(text) <= _LONGEST_PIECE:
            for at in range(1, len(text)):
                left, right = text[:at], text[at:]
                if left in ids and right in ids:
                    found.append((-float(scores[index]), ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _split_merge(text: str) -> list[str]:
    left, _, right = text[1:].partition(" ")  # a piece may begin with the separator's look-alike, never be empty
    return [text[0] + left, right]


def _document(
    header: GgufHeader, tokens: Sequence[str], types: Sequence[int], model: dict[str, Any],
    normalizer: dict[str, Any] | None, pre: dict[str, Any] | None, decoder: dict[str, Any], default_bos: bool,
) -> dict[str, Any]:  # fmt: skip
    added = [
        {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind != USER_DEFINED}
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and text
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": pre, "post_processor": _ends(header, tokens, default_bos), "decoder": decoder, "model": model,
    }  # fmt: skip


def _ends(header: GgufHeader, tokens: Sequence[str], default_bos: bool) -> dict[str, Any] | None:
    """The post-processor that puts BOS in front and EOS behind, as the metadata ask for."""
    texts = {}
    for role, default in (("bos", default_bos), ("eos", False)):
        index = header.metadata.get(f"{_PREFIX}{role}_token_id")
        wanted = header.metadata.get(f"{_PREFIX}add_{role}_token", default)
        if wanted is True and isinstance(index, int) and 0 <= index < len(tokens):
            texts[role] = (tokens[index], index)
    if not texts:
        return None

    def around(sequence: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": 0}}]
        if "bos" in texts:
            parts.insert(0, {"SpecialToken": {"id": texts["bos"][0], "type_id": 0}})
        if "eos" in texts:
            parts.append({"SpecialToken": {"id": texts["eos"][0], "type_id": 0}})
        return parts

    special = {text: {"id": text, "ids": [index], "tokens": [text]} for text, index in texts.values()}
    both = [*around("A"), *around("B")]
    return {"type": "TemplateProcessing", "single": around("A"), "pair": both, "special_tokens": special}


def _settings(header: GgufHeader, tokens: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = header.metadata.get(f"{_PREFIX}{key}_token_id")
        if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(tokens):
            settings[f"{role}_token"] = tokens[index]
    template = header.metadata.get("tokenizer.chat_template")
    return settings | ({"chat_template": template} if isinstance(template, str) else {})


def _check_buildable(path: Path, raw: Mapping[str, Any]) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(json.dumps(raw, ensure_ascii=False))
    except Exception as error:  # the binding raises bare Exception
        raise CheckpointError(f"The vocabulary of '{path}' can not be used: {error}. Fetch the file again.") from None
