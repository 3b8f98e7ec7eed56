"""Turns the plain text of public-domain books into documents, one a chapter or tale.

This is how `children.txt` and `adults.txt` were made. Hard line breaks inside a paragraph become spaces, blank lines
become one line break, underscores and picture captions are dropped: the form in which the shipped
model was trained. Front matter, lists of contents and notes of the digitisers are left out, and so
is any chapter whose text came before (some tales are in two editions).

    python examples/texts/prepare.py books.txt > children.txt

where `books.txt` holds whole books, each ended by a line `<|endoftext|>`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

END = "<|endoftext|>"
_TALE = r"THE (?:TALE|STORY) OF [A-Z.,&\- ]+|THE PIE AND(?: THE PATTY-PAN)?"
_CHAPTER = re.compile(rf"^(?:CHAPTER [IVXL]+\. .+|Chapter [IVXL]+|[IVXL]+|{_TALE})$")
_NOISE = re.compile(r"\[Illustration[^\]]*\]|_")
_NOTES = re.compile(
    r"Gutenberg|gutenberg|FREDERICK WARNE|Penguin|copyright|COPYRIGHT|http|^\[Note|^Most spellings|^Italic emph"
)


def paragraphs(book: str) -> list[str]:
    joined = (" ".join(_NOISE.sub("", block).split()) for block in re.split(r"\n\s*\n", book))
    return [text for text in joined if text and not _NOTES.search(text)]


def chapters(book: str) -> list[str]:
    """Chapters of one book; what stands before the first heading is front matter and is dropped."""
    found: list[list[str]] = []
    for paragraph in paragraphs(book):
        if _CHAPTER.match(paragraph.replace(" BY BEATRIX POTTER", "")):
            found.append([])
        elif found:
            found[-1].append(paragraph)
    return ["\n".join(lines) for lines in found]


def documents(text: str, minimum: int = 1500, shingle: int = 12) -> list[str]:
    kept: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for book in text.split(END):
        for chapter in chapters(book):
            words = re.findall(r"[a-z]+", chapter.lower())
            shingles = {tuple(words[i : i + shingle]) for i in range(len(words) - shingle)}
            if len(chapter) >= minimum and len(shingles & seen) < 0.01 * len(shingles):
                seen |= shingles
                kept.append(chapter)
    return kept


if __name__ == "__main__":
    for document in documents(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(document)
        print(END)
