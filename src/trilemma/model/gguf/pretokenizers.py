"""How text is split before merging: GGUF names the way, tokenizer.json spells it out. Both directions stand here."""

from __future__ import annotations

from typing import Any

_BEFORE_NUMBERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _BEFORE_NUMBERS + r"\p{N}{1,3}" + _AFTER_NUMBERS
QWEN2 = _BEFORE_NUMBERS + r"\p{N}" + _AFTER_NUMBERS

_EXPRESSIONS = {"llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "dbrx": LLAMA3, "smaug-bpe": LLAMA3,
                "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2}  # fmt: skip
_OWN_EXPRESSION = ("gpt-2", "smollm")  # the one of GPT-2, which ByteLevel has built in
KNOWN = tuple(sorted({*_EXPRESSIONS, *_OWN_EXPRESSION}))
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is taken whole, whatever the merges
ADD_BOS = WHOLE_WORDS  # where the metadata are silent


def pre_tokenizer(name: str) -> dict[str, Any]:
    """The pre_tokenizer of a byte-level tokenizer.json for a name in KNOWN."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": name in _OWN_EXPRESSION}
    first: list[dict[str, Any]] = []
    if name == "smollm":
        first = [{"type": "Digits", "individual_digits": True}]
    elif name in _EXPRESSIONS:
        pattern = {"Regex": _EXPRESSIONS[name]}
        first = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
    return {"type": "Sequence", "pretokenizers": [*first, level]} if first else level
