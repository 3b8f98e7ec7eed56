"""Text to a tokenizer and one flat file of token ids: the first part of `pretrain.py`."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import lzma
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pretrain_progress import bar_to_one, console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trilemma.core.errors import DataError
from trilemma.data.documents import END_OF_TEXT, Prepare, prepare_text

PIECE_CHARACTERS = 1 << 18


def make_tokenizer(
    work: Path, given: Path | None, paths: list[Path], prepare: Prepare, vocab: int, limit_bytes: int
) -> Tokenizer:
    """Byte-level BPE with <|endoftext|> as id 0, which the post-processor puts in front; trained once, or as given."""
    path = work / "tokenizer.json"
    if given is not None:
        shutil.copyfile(given, path)
    if path.exists():
        return Tokenizer.from_file(str(path))
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    with console.status("Training the tokenizer"):
        fast.train_from_iterator((text for text, _ in _limited(read_pieces(paths, prepare), limit_bytes)), trainer)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B", special_tokens=[(END_OF_TEXT, 0)]
    )
    beside = work / ".tokenizer.json"
    fast.save(str(beside))
    beside.replace(path)
    return fast


def make_tokens(
    work: Path, fast: Tokenizer, paths: list[Path], prepare: Prepare, limit_bytes: int
) -> tuple[NDArray[np.integer[Any]], dict[str, Any]]:
    """All text as one memory-mapped array of ids, and what it was made from.

    Made once for the same files, preparation and tokenizer; a run that was killed here starts it again.
    """
    kind = np.uint16 if fast.get_vocab_size() <= 1 << 16 else np.uint32
    made_from = {
        "files": [[path.name, path.stat().st_size] for path in paths], "prepare": prepare, "limit_bytes": limit_bytes,
        "tokenizer": hashlib.sha256((work / "tokenizer.json").read_bytes()).hexdigest()[:16],
    }  # fmt: skip
    note, path = work / "tokens.json", work / "tokens.bin"
    facts = json.loads(note.read_text()) if note.exists() else {}
    if facts.get("made_from") != made_from:
        note.unlink(missing_ok=True)
        text_bytes = _write_tokens(path, fast, paths, prepare, limit_bytes, kind)
        facts = {"made_from": made_from, "tokens": path.stat().st_size // kind().itemsize, "text_bytes": text_bytes}
        note.write_text(json.dumps(facts))
    return np.memmap(path, dtype=kind, mode="r"), facts


def read_pieces(
    paths: list[Path], prepare: Prepare, told: Callable[[float], None] | None = None
) -> Iterator[tuple[str, bool]]:
    """(prepared text, does a document end with it), a piece at a time, so that no file is whole in memory."""
    done, total = 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        try:
            with path.open("rb") as raw, _unpacked(path, raw) as file:
                for text, ends in _split(file):
                    yield prepare_text(text, prepare), ends
                    if told is not None and not raw.closed:
                        told((done + raw.tell()) / total)
        except (UnicodeDecodeError, lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
            raise DataError(f"'{path}' is damaged or not UTF-8 text: {error}.") from None
        done += path.stat().st_size


def _split(file: io.TextIOBase) -> Iterator[tuple[str, bool]]:
    rest = ""
    while chunk := file.read(PIECE_CHARACTERS):
        *documents, rest = (rest + chunk).split(END_OF_TEXT)
        yield from ((document, True) for document in documents)
        if (cut := rest.rfind("\n\n")) > PIECE_CHARACTERS // 2:
            yield rest[:cut], False
            rest = rest[cut:]
    yield rest, True


def _unpacked(path: Path, raw: io.BufferedReader) -> io.TextIOBase:
    if path.suffix == ".xz":
        return io.TextIOWrapper(lzma.open(raw), encoding="utf-8")
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(raw), encoding="utf-8")
    return io.TextIOWrapper(raw, encoding="utf-8")


def _limited(pieces: Iterator[tuple[str, bool]], limit_bytes: int) -> Iterator[tuple[str, bool]]:
    """The first pieces up to about so many bytes; 0 is all."""
    taken = 0
    for text, ends in pieces:
        if text.strip():
            taken += len(text.encode())
            yield text, ends
        if limit_bytes and taken >= limit_bytes:
            return


def _write_tokens(path: Path, fast: Tokenizer, paths: list[Path], prepare: Prepare, limit_bytes: int, kind: Any) -> int:
    end, text_bytes = fast.token_to_id(END_OF_TEXT), 0
    # Preparing a piece strips it; the line break between it and the next belongs to the text.
    line_break = fast.encode("\n", add_special_tokens=False).ids
    beside = path.with_suffix(".partial")
    with bar_to_one("Tokenizing") as (bar, task), beside.open("wb") as file:
        pieces = _limited(read_pieces(paths, prepare, lambda part: bar.update(task, completed=part)), limit_bytes)
        while group := list(itertools.islice(pieces, 16)):
            texts = [text for text, _ in group]
            text_bytes += sum(len(text.encode()) for text in texts)
            for (_, ends), encoded in zip(group, fast.encode_batch(texts, add_special_tokens=False), strict=True):
                np.array(encoded.ids + ([end] if ends else line_break), dtype=kind).tofile(file)
        bar.update(task, completed=1.0)
    if not text_bytes:
        raise DataError(f"No text in {', '.join(map(str, paths))}. Give files with text.")
    beside.replace(path)
    return text_bytes
