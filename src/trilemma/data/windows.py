"""Documents as token windows: what quality is measured on.

Windows lie side by side, or overlap by a stride so that every scored token has context (the sliding window of
https://huggingface.co/docs/transformers/perplexity). llama.cpp's way of cutting is in `llama_cpp_windows.py`,
calibration's in `calibration.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import DataError
from trilemma.data.documents import Document

Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]
Protocol = Literal["windows", "llama.cpp"]


@dataclass(frozen=True)
class TokenSet:
    """Windows of tokens, and which of their predictions are scored; no token is scored twice.

    The first token of a window is only context, and so are the first `leads` predictions.

    windows: int32 arrays of 2..context tokens; documents: (windows,) index of each window's document;
    text_bytes: (windows,) bytes of the scored tokens' text; sources, domains: one per document;
    leads: (windows,) leading predictions that are not scored, None: all are; text_words: (windows,) words of the
    scored text where they were counted; stride: tokens from one window's start to the next, None: the context;
    protocol: 'llama.cpp' has windows across documents, each of which then counts as a document of its own.
    """

    windows: tuple[NDArray[np.int32], ...]
    documents: NDArray[np.int64]
    text_bytes: NDArray[np.float64]
    context: int
    sources: tuple[str, ...]
    domains: tuple[str, ...]
    leads: NDArray[np.int64] | None = None
    text_words: NDArray[np.float64] | None = None
    stride: int | None = None
    protocol: Protocol = "windows"

    @property
    def tokens(self) -> int:
        return sum(len(window) for window in self.windows)

    @property
    def predicted_tokens(self) -> int:
        return int(self.predicted.sum())

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """Scored predictions of each window, (windows,)."""
        sizes = np.asarray([len(window) - 1 for window in self.windows], np.int64)
        return sizes if self.leads is None else sizes - self.leads

    def targets(self, index: int) -> NDArray[np.int32]:
        """The scored tokens of a window; the logits before each of them predict it."""
        window = self.windows[index]
        return window[len(window) - int(self.predicted[index]) :]

    @property
    def document_count(self) -> int:
        return len(self.sources)

    @cached_property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over the tokens, the context and what is scored."""
        digest = hashlib.sha256(str(self.context).encode())
        if self.protocol != "windows" or self.stride is not None or self.leads is not None:
            digest.update(f" {self.protocol} {self.stride} {self.predicted.tolist()}".encode())
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
            None if self.leads is None else self.leads[chosen],
            None if self.text_words is None else self.text_words[chosen],
            self.stride,
            self.protocol,
        )

    @classmethod
    def joined(cls, parts: Sequence[TokenSet]) -> TokenSet:
        """Several sets of one context, stride and protocol as one."""
        first, *others = parts
        if any((part.context, part.stride, part.protocol) != (first.context, first.stride, first.protocol)
               for part in others):  # fmt: skip
            raise ValueError("token sets of different contexts, strides or protocols can not be joined")
        leads = [np.zeros(len(part.windows), np.int64) if part.leads is None else part.leads for part in parts]
        words = [part.text_words for part in parts if part.text_words is not None]
        offsets = np.cumsum([0] + [part.document_count for part in parts[:-1]])
        return cls(
            tuple(window for part in parts for window in part.windows),
            np.concatenate([part.documents + offset for part, offset in zip(parts, offsets, strict=True)]),
            np.concatenate([part.text_bytes for part in parts]),
            first.context,
            tuple(source for part in parts for source in part.sources),
            tuple(domain for part in parts for domain in part.domains),
            None if all(part.leads is None for part in parts) else np.concatenate(leads),
            np.concatenate(words) if len(words) == len(parts) else None,
            first.stride,
            first.protocol,
        )

    def of_domain(self, domain: str) -> TokenSet:
        return self.take([at for at, index in enumerate(self.documents) if self.domains[index] == domain])


def make_windows(
    documents: Sequence[Document],
    encode: Encode,
    context: int,
    max_tokens: int | None = None,
    *,
    stride: int | None = None,
    decode: Decode | None = None,
    spread: bool = True,
) -> TokenSet:
    """Cut documents into windows of at most `context` tokens; no BOS unless `encode` adds one.

    With a stride below the context every token but a document's first is scored once, after at least
    `context - stride` tokens of its document (or all that come before it). Without one, windows do not overlap
    and the first token of each is context only.

    Args:
        documents: in the order in which they are used.
        encode: text to token ids.
        context: tokens of a full window; the tail of a document makes a shorter one.
        max_tokens: of text, overlaps counted once; stop there.
        stride: tokens from one window's start to the next; only the last `stride` of each are scored. None: context.
        decode: token ids to text, for the exact bytes and words of each window; without it a document's are
            shared out evenly over its tokens.
        spread: with `max_tokens`, take a similar number of windows from every document (more documents
            make tighter intervals); otherwise fill up from the first document on.

    Raises:
        DataError: no document has two tokens, the context is below 2, or the stride is not in 1..context.
    """
    if context < 2:
        raise DataError(f"A context of {context} tokens predicts nothing; give at least 2.")
    step = context if stride is None else stride
    if not 1 <= step <= context:
        raise DataError(f"A stride of {step} does not fit a context of {context}. Give 1 to {context} tokens.")
    wanted = max_tokens if max_tokens is not None else 2**62
    encoded = _encode_until(documents, encode, wanted, None if not spread else context)
    counts = _windows_per_document([len(ids) for _, ids in encoded], context, step, wanted, spread)
    windows: list[NDArray[np.int32]] = []
    owners, sizes, leads = [], [], []
    for (index, ids), count in zip(encoded, counts, strict=True):
        for start in range(0, count * step, step):
            window = np.asarray(ids[start : start + context], np.int32)
            lead = max(0, context - step - 1) if start else 0
            if len(window) >= lead + 2:
                windows.append(window)
                owners.append(index)
                leads.append(lead)
                sizes.append(_scored_text(documents[index], len(ids), window, lead, decode))
    if not windows:
        raise DataError(f"The {len(documents)} documents hold fewer than two tokens each. Give longer texts.")
    text_bytes, text_words = np.asarray(sizes, np.float64).T
    everything = TokenSet(
        tuple(windows), np.asarray(owners, np.int64), text_bytes, context,
        tuple(item.source for item in documents), tuple(item.domain for item in documents),
        np.asarray(leads, np.int64) if any(leads) else None, text_words, None if step == context else step,
    )  # fmt: skip
    return everything.take(np.arange(len(windows)))


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


def _windows_per_document(lengths: Sequence[int], context: int, stride: int, wanted: int, spread: bool) -> list[int]:
    full = [1 + max(0, -(-(length - context) // stride)) if length else 0 for length in lengths]
    if sum(lengths) <= wanted:
        return full
    counts = [0] * len(lengths)
    room = wanted
    rounds = range(max(full)) if spread else range(1)
    for turn in rounds:
        for index, length in enumerate(lengths):
            while counts[index] < full[index] and (not spread or counts[index] <= turn):
                before = context + (counts[index] - 1) * stride if counts[index] else 0  # tokens that were there
                size = min(stride if counts[index] else context, length - before)
                if size > room:
                    return counts if any(counts) else [1, *counts[1:]]
                counts[index] += 1
                room -= size
    return counts


def _scored_text(
    document: Document, tokens: int, window: NDArray[np.int32], lead: int, decode: Decode | None
) -> tuple[float, float]:
    """(bytes, words) of a window's scored tokens."""
    if decode is None:
        share = (len(window) - 1 - lead) / tokens
        return document.text_bytes * share, count_words(document.text) * share
    return text_amounts(window, lead, decode)


def text_amounts(window: NDArray[np.int32], lead: int, decode: Decode) -> tuple[float, float]:
    """(bytes, words) that the scored tokens of a window add to the text of those before them."""
    ids = [int(token) for token in window]
    whole, head = decode(ids), decode(ids[: lead + 1])
    return float(len(whole.encode()) - len(head.encode())), float(count_words(whole) - count_words(head))


def count_words(text: str) -> int:
    """Words as lm-eval counts them for word perplexity: the pieces between runs of white space."""
    return len(re.split(r"\s+", text))
