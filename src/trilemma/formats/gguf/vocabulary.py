"""A tokenizer.json as GGUF metadata: byte-level BPE ('gpt2') and BPE with byte fallback ('llama').

GGUF names a pre-tokenizer instead of carrying its expression; the name is found here by the
expression itself, and an unknown one is said in a note rather than guessed in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.model.config import DecoderConfig
from trilemma.model.gguf.pretokenizers import LLAMA3, QWEN2
from trilemma.model.gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, padding
from trilemma.model.tokenizer import Tokenizer, tokenizer_files


@dataclass
class Vocabulary:
    """What GGUF wants to know of a tokenizer; lists are by token id."""

    kind: str  # 'gpt2' or 'llama'
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    bos: int | None = None
    eos: int | None = None
    turn_end: int | None = None  # a second end, of a turn of a chat
    unknown: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, config: DecoderConfig) -> Vocabulary:
    """Translate a folder's tokenizer.json.

    Raises:
        CheckpointError: there is none, it can not be read, or it has more tokens than the model.
        UnsupportedModelError: neither kind of BPE.
    """
    tokenizer = Tokenizer.load(folder)
    files = tokenizer_files(folder)
    raw = json.loads(files["tokenizer.json"])
    model = raw["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"The tokenizer is of type '{model.get('type')}'; GGUF export writes BPE, byte-level or with byte fallback."
        )
    tokens, types = _tokens(raw, config.vocab_size)
    kind = "llama" if model.get("byte_fallback") else "gpt2"
    found = Vocabulary(kind, "default", tokens, types, chat_template=_template(files))
    _mark_ends(found, tokenizer, config)
    merges = [tuple(item) if isinstance(item, list) else tuple(item.split(" ", 1)) for item in model["merges"]]
    if kind == "llama":
        _as_sentencepiece(found, raw, merges)
    else:
        found.pre = _pre_tokenizer(raw, found.notes)
        found.merges = [f"{left} {right}" for left, right in merges]
    return found


def _tokens(raw: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Token texts and types of ids 0..size-1; ids that the tokenizer does not use are padding."""
    texts = [padding(index) for index in range(size)]
    types = [UNUSED] * size
    entries = [(index, text, NORMAL) for text, index in raw["model"]["vocab"].items()]
    for added in raw.get("added_tokens") or []:
        entries.append((added["id"], added["content"], CONTROL if added.get("special") else USER_DEFINED))
    for index, text, kind in entries:
        if index >= size:
            raise CheckpointError(f"tokenizer.json has token {index} ('{text}'); the model's vocabulary is {size}.")
        texts[index], types[index] = text, kind
    return texts, types


def _mark_ends(found: Vocabulary, tokenizer: Tokenizer, config: DecoderConfig) -> None:
    found.bos = config.bos_token_id
    found.eos, found.turn_end = (*config.eos_token_ids, None, None)[:2]
    plain, full = tokenizer.encode_plain("a"), tokenizer.encode("a")
    found.add_bos = len(full) > len(plain) and full[0] == found.bos
    found.add_eos = len(full) > len(plain) + found.add_bos and full[-1] == found.eos


def _as_sentencepiece(found: Vocabulary, raw: Mapping[str, Any], merges: list[tuple[str, ...]]) -> None:
    """Scores from the order of merges, byte and unknown tokens, and the space put in front."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(merges):
        rank.setdefault("".join(pair), index)
    last = float(-len(merges) - 1)
    found.scores = [float(-rank[text]) if text in rank else last for text in found.tokens]
    unknown = raw["model"].get("unk_token")
    for index, text in enumerate(found.tokens):
        if text == unknown:
            found.types[index], found.unknown = UNKNOWN, index
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            found.types[index] = BYTE
    normalizers = _flat(raw.get("normalizer"), "normalizers")
    found.add_space_prefix = any(item.get("type") == "Prepend" for item in normalizers) or any(
        item.get("type") == "Metaspace" and item.get("prepend_scheme") != "never"
        for item in _flat(raw.get("pre_tokenizer"), "pretokenizers")
    )


def _pre_tokenizer(raw: Mapping[str, Any], notes: list[str]) -> str:
    """GGUF's name of the pre-tokenizer, by its expressions."""
    parts = _flat(raw.get("pre_tokenizer"), "pretokenizers")
    patterns = [item["pattern"].get("Regex") for item in parts if item.get("type") == "Split"]
    digits = [item.get("individual_digits") for item in parts if item.get("type") == "Digits"]
    own_expression = any(item.get("type") == "ByteLevel" and item.get("use_regex", True) for item in parts)
    if patterns == [LLAMA3]:
        return "llama-bpe" if raw["model"].get("ignore_merges") else "dbrx"  # the same expression, by merges alone
    if patterns == [QWEN2]:
        return "qwen2"
    if own_expression and not patterns:
        return "smollm" if digits == [True] else "gpt-2"
    notes.append(
        "the tokenizer's way of splitting text has no name in GGUF that is known here; it is written as 'default', "
        "and llama.cpp may split some texts into other tokens"
    )
    return "default"


def _flat(part: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[children]) if part.get("type") == "Sequence" else [part]


def _template(files: Mapping[str, str]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"]
    found = json.loads(files.get("tokenizer_config.json", "{}")).get("chat_template")
    return found if isinstance(found, str) else None
