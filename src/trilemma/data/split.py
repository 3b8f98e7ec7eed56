"""Three disjoint texts: calibrate (techniques see it), select (search), confirm (only the final verdict).

The split is by document and by domain. Documents that share text stay in one part; what still
overlaps afterwards is left out of the later part, and every such step is noted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trilemma.core.errors import DataError
from trilemma.core.results import DataPart
from trilemma.data.documents import Document
from trilemma.data.shingles import Hashes, group_similar, shared_fraction, shingle_hashes, sorted_unique

NAMES = ("calibrate", "select", "confirm")
LEAST_DOCUMENTS = (2, 3, 3)
HELD_OUT_DOCUMENTS = 12  # at least, where a quarter of all is that many
OVERLAP = 0.05  # share of a document's 13-word shingles that makes it a near-duplicate


@dataclass(frozen=True)
class Parts:
    """The three texts, and notes on what was left out or kept together."""

    calibrate: list[Document]
    select: list[Document]
    confirm: list[Document]
    notes: tuple[str, ...] = ()

    def named(self) -> dict[str, list[Document]]:
        return {"calibrate": self.calibrate, "select": self.select, "confirm": self.confirm}


def split_documents(
    documents: Sequence[Document],
    seed: int = 0,
    shares: tuple[float, float, float] = (0.4, 0.3, 0.3),
    *,
    max_bytes: int | None = 20_000_000,
) -> Parts:
    """Split by document; the same documents, seed and shares give the same parts.

    Args:
        documents: texts, in any order.
        seed: of the shuffle.
        shares: of the bytes that calibrate, select and confirm should hold.
        max_bytes: more text than this is thinned at random, with a note (None: never).

    Raises:
        DataError: too few different documents for three parts.
    """
    notes: list[str] = []
    kept = _thin(_without_copies(documents, notes), seed, max_bytes, notes)
    require_enough(len(kept))
    hashes = [shingle_hashes(document.text) for document in kept]
    groups = group_similar(hashes, OVERLAP)
    joined = [group for group in groups if len(group) > 1]
    if joined:
        most = max(joined, key=len)
        notes.append(
            f"{sum(map(len, joined))} documents that share text were kept together in {len(joined)} groups; "
            f"the largest has {len(most)}, among them {kept[most[0]].source} and {kept[most[1]].source}"
        )
    parts = _assign(kept, groups, seed, shares)
    parts = _leave_out_overlap(kept, hashes, parts, notes)
    _require_filled(kept, parts, len(groups))
    calibrate, select, confirm = ([kept[index] for index in part] for part in parts)
    return Parts(calibrate, select, confirm, tuple(notes))


def hold_out(
    documents: Sequence[Document], seed: int = 0, share: float = 0.05, *, most_bytes: int = 400_000
) -> tuple[list[Document], list[Document]]:
    """Documents to learn from and documents to measure on, which share no text.

    Exact copies are dropped; what shares text with a held-out document is left out of both.

    Args:
        share: of the documents' bytes that is held out, at most `most_bytes` but at least twelve documents, so
            that intervals mean something, or a quarter of them (three) where there are few.

    Raises:
        DataError: fewer than six different documents.
    """
    kept = _without_copies(documents, [])
    if len(kept) < 2 * LEAST_DOCUMENTS[2]:
        raise DataError(
            f"Found {len(kept)} different documents; at least {2 * LEAST_DOCUMENTS[2]} are needed, since some are held "
            "out to measure on. Give more text; separate documents with '<|endoftext|>' or blank lines."
        )
    order = list(range(len(kept)))
    random.Random(seed).shuffle(order)
    wanted = min(most_bytes, share * sum(document.text_bytes for document in kept))
    least = max(LEAST_DOCUMENTS[2], min(HELD_OUT_DOCUMENTS, len(kept) // 4))
    held: list[int] = []
    size = 0
    for index in order[: len(kept) // 2]:
        if len(held) >= least and size >= wanted:
            break
        held.append(index)
        size += kept[index].text_bytes
    pool = _pool([shingle_hashes(kept[index].text) for index in held])
    rest = sorted(set(order) - set(held))
    training = [kept[i] for i in rest if shared_fraction(shingle_hashes(kept[i].text), pool) < OVERLAP]
    if not training:
        raise DataError("Every document shares text with a held-out one, so nothing is left to learn from.")
    return training, [kept[index] for index in sorted(held)]


def require_enough(count: int) -> None:
    """Raises DataError when so few documents can not make three parts."""
    least = sum(LEAST_DOCUMENTS)
    if count < least:
        raise DataError(
            f"Found {count} different document{'s' if count != 1 else ''}; at least {least} are needed "
            f"(calibrate {LEAST_DOCUMENTS[0]}, select {LEAST_DOCUMENTS[1]}, confirm {LEAST_DOCUMENTS[2]}), and 60 or "
            "more make useful intervals. Give more text; separate documents with '<|endoftext|>' or blank lines."
        )


def require_disjoint(parts: Mapping[str, Sequence[Document]], threshold: float = OVERLAP) -> None:
    """Refuse parts that the user made when they overlap.

    Raises:
        DataError: names documents of a part that share text with another part.
    """
    hashes = {name: [shingle_hashes(document.text) for document in part] for name, part in parts.items()}
    found: list[str] = []
    names = list(parts)
    for place, name in enumerate(names):
        for other in names[:place]:
            pool = _pool(hashes[other])
            for document, own in zip(parts[name], hashes[name], strict=True):
                share = shared_fraction(own, pool)
                if share >= threshold:
                    found.append(f"{document.source} ({name}) shares {share:.0%} of its text with {other}")
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise DataError(
            f"The texts overlap, so a result on one would flatter itself: {'; '.join(found[:5])}{more}. "
            "Take these documents out of one of the parts, or give one set of texts and let it be split."
        )


def describe_part(name: str, documents: Sequence[Document], tokens: int) -> DataPart:
    """How much a part held, for the report."""
    return DataPart(
        name=name, documents=len(documents), tokens=tokens, text_bytes=sum(item.text_bytes for item in documents)
    )


def _without_copies(documents: Sequence[Document], notes: list[str]) -> list[Document]:
    seen: dict[str, Document] = {}
    copies = []
    for document in documents:
        if seen.setdefault(" ".join(document.text.split()), document) is not document:
            copies.append(document.source)
    if copies:
        notes.append(f"{len(copies)} exact copies were dropped, the first is {copies[0]}")
    return list(seen.values())


def _thin(documents: list[Document], seed: int, max_bytes: int | None, notes: list[str]) -> list[Document]:
    sizes = [document.text_bytes for document in documents]
    if max_bytes is None or sum(sizes) <= max_bytes:
        return documents
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    room, chosen = max_bytes, []
    for index in order:
        if sizes[index] <= room:
            chosen.append(index)
            room -= sizes[index]
    notes.append(
        f"{len(chosen)} of {len(documents)} documents were drawn at random: {sum(sizes)} bytes of text are more than "
        f"the {max_bytes} that are used"
    )
    return [documents[index] for index in sorted(chosen)]


def _assign(
    documents: list[Document], groups: list[list[int]], seed: int, shares: tuple[float, float, float]
) -> list[list[int]]:
    """Each group goes where its domain lacks most; the largest groups first, ties in shuffled order."""
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda index: len(groups[index]) > 1, reverse=True)
    parts: list[list[int]] = [[], [], []]
    held: dict[str, list[float]] = {}
    for index in order:
        group = groups[index]
        size = sum(len(documents[item].text) for item in group)
        domain = held.setdefault(documents[group[0]].domain, [0.0, 0.0, 0.0])
        empty = [place for place in range(3) if len(parts[place]) < LEAST_DOCUMENTS[place] and shares[place] > 0]
        places = empty or range(3)
        place = min(places, key=lambda at: (domain[at] + size / 2) / max(shares[at], 1e-9))
        domain[place] += size
        parts[place] += group
    return [sorted(part) for part in parts]


def _leave_out_overlap(
    documents: list[Document], hashes: list[Hashes], parts: list[list[int]], notes: list[str]
) -> list[list[int]]:
    kept: list[list[int]] = []
    for name, part in zip(NAMES, parts, strict=True):
        pool = _pool([hashes[index] for earlier in kept for index in earlier])
        clean = [index for index in part if shared_fraction(hashes[index], pool) < OVERLAP]
        gone = sorted(set(part) - set(clean))
        if gone:
            notes.append(
                f"{len(gone)} documents were left out of '{name}' because they share text with earlier parts, "
                f"the first is {documents[gone[0]].source}"
            )
        kept.append(clean)
    return kept


def _require_filled(documents: list[Document], parts: list[list[int]], groups: int) -> None:
    short = [name for name, part, least in zip(NAMES, parts, LEAST_DOCUMENTS, strict=True) if len(part) < least]
    if short:
        raise DataError(
            f"{len(documents)} documents make only {groups} groups without shared text, which leaves too few for "
            f"{', '.join(short)} (needed: calibrate 2, select 3, confirm 3 documents). Give more varied text."
        )


def _pool(hashes: Sequence[Hashes]) -> Hashes:
    return sorted_unique(np.concatenate(list(hashes))) if hashes else np.zeros(0, np.uint64)
