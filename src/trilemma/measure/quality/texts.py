"""The user's texts as the windows that quality is measured on: which context, which stride, whose protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trilemma.core.errors import DataError, InputError
from trilemma.data.documents import END_OF_TEXT, Document, Prepare, prepare_text, read_documents, read_text
from trilemma.data.llama_cpp_windows import llama_cpp_windows
from trilemma.data.windows import Protocol, TokenSet, make_windows
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer

DEFAULT_CONTEXT = 2048
DEFAULT_TOKENS = 30_000

Paths = str | Path | Sequence[str | Path]


def choose_context(model: Model, asked: int | None) -> int:
    """Tokens a window. Raises InputError when more was asked for than the model has."""
    if asked is not None and asked > model.config.max_context:
        raise InputError(
            f"A context of {asked} is longer than the model's {model.config.max_context}. Ask for at most that."
        )
    return asked or min(DEFAULT_CONTEXT, model.config.max_context)


def read_token_set(
    model: Model,
    data: Paths | Mapping[str, Paths],
    context: int,
    max_tokens: int | None,
    prepare: Prepare,
    *,
    stride: int | None = None,
    protocol: Protocol = "windows",
) -> TokenSet:
    """Windows of the texts in the model's own tokens, `max_tokens` of each domain.

    Args:
        stride: tokens from one window's start to the next, None: no overlap; not for llama.cpp's protocol.
        protocol: 'windows', within documents; 'llama.cpp', as its perplexity tool cuts the whole text.

    Raises:
        DataError: no texts, or too little of them. CheckpointError: no tokenizer.
        InputError: a model from no folder, or a stride in llama.cpp's protocol.
    """
    if not data:
        raise DataError("Quality needs text. Give at least one file with --data, or name=file with --domain.")
    tokenizer = tokenizer_of(model)
    if protocol == "llama.cpp":
        if stride is not None:
            raise InputError("llama.cpp's protocol has windows side by side; leave the stride out.")
        return _llama_cpp_set(tokenizer, data, context, max_tokens, prepare)
    if isinstance(data, Mapping):
        documents = [
            item
            for name, paths in data.items()
            for item in read_documents(paths, name, prepare=prepare, render=tokenizer.transcript)
        ]
    else:
        documents = read_documents(data, prepare=prepare, render=tokenizer.transcript)
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    sets = [
        make_windows(texts, tokenizer.encode_plain, context, max_tokens, stride=stride, decode=tokenizer.decode)
        for texts in by_domain.values()
    ]
    return TokenSet.joined(sets)


def tokenizer_of(model: Model) -> Tokenizer:
    """The tokenizer in a model's folder. Raises InputError where the model came from none."""
    if model.path is None:
        raise InputError("This model came from no folder, so it has no tokenizer; quality of text needs one.")
    return Tokenizer.load(model.path)


def _llama_cpp_set(
    tokenizer: Tokenizer, data: Paths | Mapping[str, Paths], context: int, max_tokens: int | None, prepare: Prepare
) -> TokenSet:
    named = data if isinstance(data, Mapping) else {_domain_of(path): path for path in _listed(data)}
    bos = bos_of(tokenizer)
    sets = [
        llama_cpp_windows(
            "\n".join(_whole_text(Path(path), prepare) for path in _listed(paths)), tokenizer.encode_plain, context,
            max_tokens, bos=bos, decode=tokenizer.decode, domain=name,
        )
        for name, paths in named.items()
    ]  # fmt: skip
    return TokenSet.joined(sets)


def bos_of(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer puts in front of a text."""
    plain, special = tokenizer.encode_plain("a"), tokenizer.encode("a")
    return next((special[:at] for at in range(len(special)) if special[at : at + len(plain)] == plain), [])


def _whole_text(path: Path, prepare: Prepare) -> str:
    """A text file as it stands; one of documents as these, a line break between them."""
    plain = path.name.removesuffix(".xz").removesuffix(".gz")
    text = "" if plain.endswith((".json", ".jsonl")) else read_text(path)
    if text and END_OF_TEXT not in text:
        return prepare_text(text, prepare)
    return "\n".join(item.text for item in read_documents(path, prepare=prepare, cut=False))


def _listed(paths: Paths) -> list[str | Path]:
    return [paths] if isinstance(paths, str | Path) else list(paths)


def _domain_of(path: str | Path) -> str:
    return Path(path).name.split(".")[0]
