"""What calibration sees: full windows of tokens, from one text or from several in proportion to their weights.

The draw of plain texts without weights is part of what a recipe promises: the same files and seed give the same
tokens in every release.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import DataError
from trilemma.data.documents import Document
from trilemma.data.text_source import TextSource, weights_of

Encode = Callable[[str], Sequence[int]]


def sample_calibration(
    documents: Sequence[Document],
    encode: Encode,
    context: int,
    count: int,
    seed: int = 0,
    *,
    encode_chat: Encode | None = None,
    sources: Sequence[TextSource] = (),
) -> NDArray[np.int32]:
    """Full windows for calibration, from documents in shuffled order; short documents are joined.

    A conversation that fits a window is whole in one: conversations follow each other, and where the next does not fit,
    its beginning fills the window and it begins the next one again. A longer one is cut between messages.

    Args:
        encode: text to token ids.
        encode_chat: the same for conversations, whose text has its special tokens already; None: `encode`.
        sources: the files that the documents are from, in order. With weights each gives its share of the windows,
            at least one, and so does every beginning of the list; where a file has too little text for its share,
            there are fewer windows of all.

    Returns:
        (n, context) int32, n = count or what the text gives.

    Raises:
        DataError: not enough text for one window, of every file where they have weights; or weights for some only.
    """
    chat = encode_chat or encode
    weights = weights_of(sources)
    if weights is None:
        windows = _draw(documents, encode, chat, context, count, np.random.default_rng(seed))
        if not windows:
            raise DataError(
                f"The calibration text has fewer than {context} tokens, which is one window. Give more text, "
                "or a shorter context."
            )
        return np.stack(windows)
    if count < len(sources):
        raise DataError(f"{count} windows can not hold {len(sources)} texts. Give fewer files.")
    groups = []
    for at, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        own = [document for document in documents if document.file == at]
        most = min(count, int(count * weight / sum(weights)) + 2)
        groups.append(_draw(own, encode, chat, context, most, np.random.default_rng([seed, at])))
        if not groups[-1]:
            raise DataError(
                f"'{source.path}' has fewer than {context} tokens of calibration text, which is one window. Give more "
                "of it, or leave the file out."
            )
    return np.stack(_mix(groups, weights, count))


def _mix(groups: Sequence[list[NDArray[np.int32]]], weights: Sequence[float], count: int) -> list[NDArray[np.int32]]:
    """Webster's method of seats: the next window is of the text that is furthest behind, until one has no more."""
    taken = [0] * len(groups)
    mixed: list[NDArray[np.int32]] = []
    while len(mixed) < count:
        at = min(range(len(groups)), key=lambda of: (taken[of] > 0, (taken[of] + 0.5) / weights[of], of))
        if taken[at] == len(groups[at]):
            break
        mixed.append(groups[at][taken[at]])
        taken[at] += 1
    return mixed


def _draw(
    documents: Sequence[Document], encode: Encode, encode_chat: Encode, context: int, count: int,
    rng: np.random.Generator,
) -> list[NDArray[np.int32]]:  # fmt: skip
    """At most `count` windows of documents in shuffled order."""
    windows: list[NDArray[np.int32]] = []
    rest: list[int] = []
    talk: list[int] = []
    per_document = max(1, -(-count // max(1, len(documents))))
    spare: list[NDArray[np.int32]] = []
    for index in rng.permutation(len(documents)):
        if len(windows) >= count:
            break
        if documents[index].turns:
            for piece in conversation_pieces(documents[index], encode_chat, context):
                full, talk = _pack(talk, piece, context)
                windows += full
            continue
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
    return (windows + spare)[:count]


def conversation_pieces(document: Document, encode: Encode, context: int) -> list[list[int]]:
    """The tokens of a conversation, cut between messages into pieces of at most `context` where these allow it.

    A single message that is longer is cut like text.
    """
    whole = list(encode(document.text))
    if len(whole) <= context:
        return [whole]
    bounds = [*document.turns, len(document.text)]
    pieces: list[list[int]] = []
    held: list[int] = []
    start = bounds[0]
    for begin, end in pairwise(bounds):
        longer = list(encode(document.text[start:end]))
        if len(longer) > context and held:
            pieces.append(held)
            start, longer = begin, list(encode(document.text[begin:end]))
        held = longer
    return [piece[at : at + context] for piece in [*pieces, held] for at in range(0, len(piece), context)]


def _pack(held: list[int], piece: list[int], context: int) -> tuple[list[NDArray[np.int32]], list[int]]:
    """(windows that are now full, what is held for the next one)."""
    room = context - len(held)
    if len(piece) < room:
        return [], held + piece
    full = [np.asarray(held + piece[:room], np.int32)]
    if len(piece) == room:
        return full, []
    return ([*full, np.asarray(piece, np.int32)], []) if len(piece) == context else (full, piece)
