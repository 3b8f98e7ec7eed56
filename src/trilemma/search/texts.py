"""The user's texts as a search uses them: three disjoint parts in the model's own tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.core.recipe import Calibration
from trilemma.core.results import DataFile, DataPart
from trilemma.data.documents import Document, Prepare, read_documents
from trilemma.data.split import Parts, describe_part, split_documents
from trilemma.data.text_source import read_sources
from trilemma.data.windows import TokenSet, make_windows
from trilemma.model.tokenizer import Tokenizer
from trilemma.techniques.calibration_text import CALIBRATION_PART, calibration_windows


@dataclass(frozen=True)
class Texts:
    """Parts by document, calibration windows, and what reads them. Token sets are cut on demand."""

    parts: Parts
    tokenizer: Tokenizer
    context: int
    calibration: NDArray[np.int32]  # (windows, tokens)
    calibration_record: Calibration
    files: tuple[DataFile, ...]

    def token_set(self, part: str, tokens: int) -> TokenSet:
        documents = self.parts.named()[part]
        return make_windows(documents, self.tokenizer.encode_plain, self.context, tokens, decode=self.tokenizer.decode)

    def describe(self, used: dict[str, TokenSet]) -> tuple[DataPart, ...]:
        """How much each part held: the documents of the part, and the tokens that were really used."""
        counts = {"calibrate": int(self.calibration.size)} | {name: item.tokens for name, item in used.items()}
        return tuple(
            describe_part(name, documents, counts.get(name, 0)) for name, documents in self.parts.named().items()
        )


def read_texts(data: Sequence[str | Path], tokenizer: Tokenizer, context: int, seed: int, prepare: Prepare) -> Texts:
    """Read, split and cut.

    Raises:
        DataError: texts that can not be used, or too few documents for three parts.
    """
    sources = read_sources(data)
    documents = read_documents(sources, prepare=prepare, render=tokenizer.transcript)
    parts = split_documents(documents, seed)
    windows, record = calibration_windows(
        parts.calibrate, tokenizer, context, seed=seed, part=CALIBRATION_PART, prepare=prepare, sources=sources
    )
    return Texts(parts, tokenizer, context, windows, record, describe_files(data))


def describe_files(data: Sequence[str | Path]) -> tuple[DataFile, ...]:
    """The files as they were named, and what is in them."""
    digests = [hashlib.sha256(source.path.read_bytes()).hexdigest()[:16] for source in read_sources(data)]
    return tuple(DataFile(path=str(item), sha256=digest) for item, digest in zip(data, digests, strict=True))


def prompts_of(documents: Sequence[Document], tokenizer: Tokenizer, count: int, tokens: int) -> list[list[int]]:
    """The first tokens of different documents, as prompts; at most that many, and no word cut in two."""
    found = []
    for document in documents:
        ids = tokenizer.encode(document.text[: 40 * tokens], special=not document.turns)
        if len(ids) > tokens:
            found.append(_whole_words(ids[: tokens + 1], tokenizer))
        if len(found) == count:
            break
    return found


def _whole_words(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """All but the last token, or fewer: as many as end where the next token begins a word."""
    texts = [tokenizer.decode(list(ids[:count])) for count in range(len(ids) + 1)]
    for count in range(len(ids) - 1, len(ids) // 2, -1):
        if texts[count + 1][len(texts[count]) :][:1].isspace():
            return list(ids[:count])
    return list(ids[:-1])
