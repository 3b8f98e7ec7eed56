"""Reads the user's texts into documents, the unit that is split, resampled and reported.

An interval over documents needs many of them, so long books are cut into chapters or sections.
A conversation stays whole. Left out: cleaning and language detection.
"""

from __future__ import annotations

import gzip
import lzma
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trilemma.core.errors import DataError
from trilemma.data.rows import Render, RowText, read_rows
from trilemma.data.text_source import TextSource

Prepare = Literal["none", "book"]

END_OF_TEXT = "<|endoftext|>"
WANTED_DOCUMENTS = 60  # what cutting aims at when the texts are short
SECTION_CHARACTERS = (1_000, 16_000)  # least and largest aim for one section

_BLANK = re.compile(r"\n[ \t\r]*\n\s*")
_HEADING = re.compile(
    r"^\s*(?:(?:chapter|book|part|section|letter|canto|act|scene|story|volume)\b.{0,80}"
    r"|[IVXLC]{1,7}\.?(?:\s.{0,60})?|\d{1,3}\.(?:\s.{0,60})?|#{1,3} .{1,80}|= [^=].{0,80} =)\s*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Document:
    """One text. `source` says where it came from, precisely enough to find it again.

    file: which of the files read together; turns: where the messages of a conversation begin, in characters; its
    text has the template's special tokens already. Empty for plain text.
    """

    text: str
    domain: str
    source: str
    file: int = 0
    turns: tuple[int, ...] = ()

    @property
    def text_bytes(self) -> int:
        return len(self.text.encode())


def read_documents(
    paths: str | Path | Sequence[str | Path | TextSource],
    domain: str | None = None,
    *,
    prepare: Prepare = "none",
    cut: bool = True,
    render: Render | None = None,
) -> list[Document]:
    """Read .txt, .json, .jsonl and their .xz or .gz forms; anything else is read as text.

    Args:
        paths: files, FILE#FIELD for a field of its rows. Text is split at `<|endoftext|>`; .json is a list and
            .jsonl has one a line of a string, {"text"} or {"messages"} in the OpenAI form.
        domain: the domain's name; None takes each file's name without suffixes.
        prepare: 'book' makes hard line breaks inside a paragraph spaces, blank lines one line
            break, and drops underscores; 'none' leaves the text as it is, and conversations are left alone.
        cut: cut long documents into chapters or sections; conversations stay whole.
        render: messages and tools to text, such as `Tokenizer.transcript`; None: conversations are refused.

    Raises:
        DataError: a file is missing, empty, binary, not UTF-8 or not of the form its name says.
    """
    sources = [_unweighted(item) for item in ([paths] if isinstance(paths, str | Path) else paths)]
    if not sources:
        raise DataError("No text files were given. Give at least one .txt, .json or .jsonl file.")
    whole = [item for at, source in enumerate(sources) for item in _read_file(source, at, domain, render)]
    if cut:
        aim = section_aim(sum(len(document.text) for document in whole))
        whole = [section for document in whole for section in cut_document(document, aim)]
    ready = [item if item.turns else replace(item, text=prepare_text(item.text, prepare)) for item in whole]
    return [document for document in ready if document.text.strip()]


def read_text(path: str | Path) -> str:
    """The whole text of a file as it stands, unpacked where its name ends in .xz or .gz; line ends are \\n.

    Raises:
        DataError: a file that is missing, empty, binary or not UTF-8.
    """
    return _decode(Path(path), _read_bytes(Path(path)))


def prepare_text(text: str, how: Prepare) -> str:
    """Bring a text into the form that a model was trained on (see `read_documents`).

    Raises:
        DataError: an unknown way.
    """
    if how == "none":
        return text
    if how != "book":
        raise DataError(f"Unknown text preparation '{how}'. Valid: none, book.")
    paragraphs = (" ".join(line.strip() for line in part.splitlines()) for part in _BLANK.split(text.strip()))
    return "\n".join(paragraphs).replace("_", "")


def section_aim(characters: int) -> int:
    """The length in characters that sections of so much text should have."""
    least, most = SECTION_CHARACTERS
    return max(least, min(most, characters // WANTED_DOCUMENTS))


def cut_document(document: Document, aim: int) -> list[Document]:
    """Cut at headings, else at blank lines, else at line ends or spaces; sections of aim/4 to 1.5 aim."""
    if document.turns or len(document.text) <= aim * 3 // 2:
        return [document]
    sections = _sections(document.text, least=aim // 4, most=aim * 3 // 2)
    return [
        replace(document, text=text, source=f"{document.source}, section {number}")
        for number, text in enumerate(sections, 1)
    ]


def _sections(text: str, least: int, most: int) -> list[str]:
    sections: list[str] = []
    current = ""
    for paragraph in _paragraphs(text, most):
        starts_anew = len(current) >= least and _HEADING.match(paragraph.strip()) is not None
        if current and (starts_anew or len(current) + len(paragraph) > most):
            sections.append(current)
            current = ""
        current += paragraph
    if len(current) < least and sections:
        sections[-1] += current
    elif current:
        sections.append(current)
    return sections


def _paragraphs(text: str, most: int) -> Iterable[str]:
    """Pieces that join to the text again: paragraphs, or lines where one is too long, or runs of words."""
    for paragraph in _pieces(text, _BLANK):
        if len(paragraph) <= most:
            yield paragraph
            continue
        for line in _pieces(paragraph, re.compile(r"\n")):
            while len(line) > most:
                at = line.rfind(" ", most // 2, most) + 1 or most
                yield line[:at]
                line = line[at:]
            yield line


def _pieces(text: str, separator: re.Pattern[str]) -> Iterable[str]:
    start = 0
    for match in separator.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def _unweighted(item: str | Path | TextSource) -> TextSource:
    if isinstance(item, TextSource):
        return item
    source = TextSource.parse(item)
    if source.weight is not None:
        raise DataError(f"'{item}' has a weight, which is for calibration text alone. Give '{source.path}'.")
    return source


def _read_file(source: TextSource, file: int, domain: str | None, render: Render | None) -> list[Document]:
    path = source.path
    text = _decode(path, _read_bytes(path))
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in (".xz", ".gz")]
    kind = suffixes[-1] if suffixes else ".txt"
    if kind in (".json", ".jsonl"):
        rows = read_rows(path, text, source.field, render, lines=kind == ".jsonl")
    elif source.field is not None:
        raise DataError(f"'{path}#{source.field}' names a field, but '{path}' is plain text. Leave the field out.")
    else:
        rows = [RowText(part.strip("\n")) for part in text.split(END_OF_TEXT)]
    found = [
        Document(row.text, domain or path.name.split(".")[0], f"{path.name}, document {number}", file, row.turns)
        for number, row in enumerate(rows, 1)
        if row.text.strip()
    ]
    if not found:
        raise DataError(f"'{path}' holds no text. Give a file with at least one document.")
    return found


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        hint = " A weight is a number, as in books.txt:0.7." if ":" in path.name else ""
        raise DataError(f"The text file '{path}' does not exist.{hint}")
    if path.is_dir():
        raise DataError(f"'{path}' is a folder. Give the text files in it one by one.")
    unpackers: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}
    try:
        data = unpackers.get(path.suffix.lower(), bytes)(path.read_bytes())
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"'{path}' is damaged or not {path.suffix[1:]} data: {error}.") from None
    except OSError as error:
        raise DataError(f"'{path}' can not be read: {error.strerror or error}.") from None
    if not data.strip():
        raise DataError(f"'{path}' is empty. Give a file with text.")
    return data


def _decode(path: Path, data: bytes) -> str:
    if b"\0" in data[:65536]:
        raise DataError(f"'{path}' looks like a binary file (byte {data.index(0)} is 0). Give UTF-8 text.")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        bad = data[error.start]
        raise DataError(
            f"'{path}' is not UTF-8: byte {error.start} is 0x{bad:02x}. Convert it, for example: "
            f"iconv -f latin1 -t utf-8 '{path.name}'."
        ) from None
