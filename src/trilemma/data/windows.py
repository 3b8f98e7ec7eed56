"""Documents as token windows: what quality is measured on and what calibration sees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import DataError
from trilemma.data.documents import Document

Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class TokenSet:
    """Windows without overlap, none across two documents; the first token of each is only context.

    windows: int32 arrays of 2..context tokens; documents: (windows,) index of each window's document;
    text_bytes: (windows,) bytes of the predicted tokens' text; sources, domains: one per document.
    """

    windows: tuple[NDArray[np.int32], ...]
    documents: NDArray[np.int64]
    text_bytes: NDArray[np.float64]
    context: int
    sources: tuple[str, ...]
    domains: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return sum(len(window) for window in self.windows)

    @property
    def predicted_tokens(self) -> int:
        return sum(len(window) - 1 for window in self.windows)

    @property
    def document_count(self) -> int:
        return len(self.sources)

    @cached_property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over the tokens and the context."""
        digest = hashlib.sha256(str(self.context).encode())
        for window in self.windows:
            digest.update(np.int64(len(window)).tobytes() + window.tobytes())
        return digest.hexdigest()[:16]

    def first(self, count: int) -> TokenSet:
        """Only the first windows."""
        return self.take(np.arange(min(count, len(self.windows))))

    def take(self, indices: NDArray[np.int64] | Sequence[int]) -> TokenSet:
        """Only these windows; documents without a window are dropped and the rest renumbered."""
        chosen = np.asarray(indices, np.int64)
        used, documents = np.unique(self.documents[chosen], return_inverse=True)
        return TokenSet(
            tuple(self.windows[index] for index in chosen),
            documents.astype(np.int64),
            self.text_bytes[chosen],
            self.context,
            tuple(self.sources[index] for index in used),
            tuple(self.domains[index] for index in used),
        )

    @classmethod
    def joined(cls, parts: Sequence[TokenSet]) -> TokenSet:
        """Several sets of one context as one."""
        offsets = np.cumsum([0] + [part.document_count for part in parts[:-1]])
        return cls(
            tuple(window for part in parts for window in part.windows),
            np.concatenate([part.documents + offset for part, offset in zip(parts, offsets, strict=True)]),
            np.concatenate([part.text_bytes for part in parts]),
            parts[0].context,
            tuple(source for part in parts for source in part.sources),
            tuple(domain for part in parts for domain in part.domains),
        )

    def of_domain(self, domain: str) -> TokenSet:
        return self.take([at for at, index in enumerate(self.documents) if self.domains[index] == domain])


def make_windows(
    documents: Sequence[Document],
    encode: Encode,
    context: int,
    max_tokens: int | None = None,
    *,
    decode: Decode | None = None,
    spread: bool = True,
) -> TokenSet:
    """Cut documents into windows of at most `context` tokens; no BOS unless `encode` adds one.

    Args:
        documents: in the order in which they are used.
        encode: text to token ids.
        context: tokens of a full window; the tail of a document makes a shorter one.
        max_tokens: stop there.
        decode: token ids to text, for the exact bytes of each window; without it a document's bytes
            are shared out evenly over its tokens.
        spread: with `max_tokens`, take a similar number of windows from every document (more documents
            make tighter intervals); otherwise fill up from the first document on.

    Raises:
        DataError: no document has two tokens, or the context is below 2.
    """
    if context < 2:
        raise DataError(f"A context of {context} tokens predicts nothing; give at least 2.")
    wanted = max_tokens if max_tokens is not None else 2**62
    encoded = _encode_until(documents, encode, wanted, None if not spread else context)
    counts = _windows_per_document([len(ids) for _, ids in encoded], context, wanted, spread)
    windows: list[NDArray[np.int32]] = []
    owners, sizes = [], []
    for (index, ids), count in zip(encoded, counts, strict=True):
        for start in range(0, count * context, context):
            window = np.asarray(ids[start : start + context], np.int32)
            if len(window) >= 2:
                windows.append(window)
                owners.append(index)
                sizes.append(_predicted_bytes(documents[index], len(ids), window, decode))
    if not windows:
        raise DataError(f"The {len(documents)} documents hold fewer than two tokens each. Give longer texts.")
    everything = TokenSet(
        tuple(windows), np.asarray(owners, np.int64), np.asarray(sizes, np.float64), context,
        tuple(item.source for item in documents), tuple(item.domain for item in documents),
    )  # fmt: skip
    return everything.take(np.arange(len(windows)))


def sample_calibration(
    documents: Sequence[Document], encode: Encode, context: int, count: int, seed: int = 0
) -> NDArray[np.int32]:
    """Full windows for calibration, from documents in shuffled order; short documents are joined.

    Returns:
        (n, context) int32, n = count or what the text gives.

    Raises:
        DataError: not enough text for one window.
    """
    rng = np.random.default_rng(seed)
    windows: list[NDArray[np.int32]] = []
    rest: list[int] = []
    per_document = max(1, -(-count // max(1, len(documents))))
    spare: list[NDArray[np.int32]] = []
    for index in rng.permutation(len(documents)):
        if len(windows) >= count:
            break
        ids = list(encode(documents[index].text))
        if len(ids) < context:
            rest += ids
            if len(rest) >= context:
                windows.append(np.asarray(rest[:context], np.int32))
                rest = rest[context:]
            continue
        offset = int(rng.integers(0, len(ids) % context + 1))
        found = np.asarray(ids[offset : offset + (len(ids) - offset) // context * context], np.int32)
        shuffled = rng.permutation(found.reshape(-1, context), axis=0)
        windows += list(shuffled[:per_document])
        spare += list(shuffled[per_document:])
    windows += spare[: max(0, count - len(windows))]
    if not windows:
        raise DataError(
            f"The calibration text has fewer than {context} tokens, which is one window. Give more text, "
            "or a shorter context."
        )
    return np.stack(windows[:count])


def _encode_until(
    documents: Sequence[Document], encode: Encode, wanted: int, least: int | None
) -> list[tuple[int, Sequence[int]]]:
    """Encode in order; without spreading, stop when there is enough; with it, when each could give one window."""
    encoded: list[tuple[int, Sequence[int]]] = []
    total = 0
    for index, document in enumerate(documents):
        ids = encode(document.text)
        encoded.append((index, ids))
        total += len(ids) if least is None else min(len(ids), least)
        if total >= wanted:
            break
    return encoded


def _windows_per_document(lengths: Sequence[int], context: int, wanted: int, spread: bool) -> list[int]:
    full = [-(-length // context) for length in lengths]
    if sum(lengths) <= wanted:
        return full
    counts = [0] * len(lengths)
    room = wanted
    rounds = range(max(full)) if spread else range(1)
    for turn in rounds:
        for index, length in enumerate(lengths):
            while counts[index] < full[index] and (not spread or counts[index] <= turn):
                size = min(context, length - counts[index] * context)
                if size > room:
                    return counts if any(counts) else [1, *counts[1:]]
                counts[index] += 1
                room -= size
    return counts


def _predicted_bytes(document: Document, tokens: int, window: NDArray[np.int32], decode: Decode | None) -> float:
    if decode is None:
        return document.text_bytes * (len(window) - 1) / tokens
    ids = [int(token) for token in window]
    return float(len(decode(ids).encode()) - len(decode(ids[:1]).encode()))
