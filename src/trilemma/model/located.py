"""Where a tensor lies in a file, for an engine that reads files by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Piece:
    """A run of bytes of a file, and zlib's CRC-32 of it where one is known."""

    offset: int
    nbytes: int
    crc32: int | None = None


@dataclass(frozen=True)
class Located:
    """One matrix (out, in) as it lies in a file.

    encoding: 'panels' (as the engine holds it), 'rows' (values one after another), or GGUF's name of a type of blocks.
    format: the storage format that it has once it is read.
    label: its name in the file. file_bytes: the size of the file when its header was checked.
    order: row i of the matrix is row order[i] of the file; None where they are the same.
    """

    encoding: str
    format: str
    shape: tuple[int, int]
    label: str
    file: Path
    file_bytes: int
    pieces: Mapping[str, Piece]
    order: NDArray[np.intp] | None = None
