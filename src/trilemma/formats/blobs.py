"""A safetensors file written and read a blob at a time, in the alignment that a memory map wants.

The header is padded to 4096 bytes and every blob starts at a multiple of 64; the gaps are filled by
entries named `<blob>.padding`, because safetensors allows no holes. The file is an ordinary
safetensors file to anybody else. Nothing stays mapped or in memory after reading.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError
from trilemma.core.record import Record
from trilemma.model.located import Piece
from trilemma.model.safetensors import SafetensorsFile

HEADER_STEP = 4096
BLOB_STEP = 64
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8, "I8": np.int8}
_WIDTH = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}


class BlobSpec(Record):
    """One entry of the file: its safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * _WIDTH[self.dtype]


class BlobWriter:
    """Writes the announced blobs in order; `digests` and `crcs` then hold SHA-256 and CRC-32 of each."""

    def __init__(self, path: Path, blobs: Sequence[BlobSpec]) -> None:
        self._pending = list(blobs)
        self._file = path.open("wb")
        self._whole = hashlib.sha256()
        self.digests: dict[str, str] = {}
        self.crcs: dict[str, int] = {}
        self._put(_header(blobs))

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Append the next blob; `values` must have the announced bytes."""
        spec = self._pending.pop(0)
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        assert (spec.name, spec.nbytes) == (name, raw.nbytes), f"{name}: {raw.nbytes} bytes, announced {spec}"
        self.digests[name] = hashlib.sha256(raw).hexdigest()
        self.crcs[name] = zlib.crc32(raw)
        self._put(raw)
        self._put(bytes(-spec.nbytes % BLOB_STEP))

    def close(self) -> str:
        """Flush to the disk and return the SHA-256 of the whole file."""
        assert not self._pending, f"{len(self._pending)} announced blobs were not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._whole.hexdigest()

    def abandon(self) -> None:
        self._file.close()

    def _put(self, raw: bytes | memoryview) -> None:
        self._whole.update(raw)
        self._file.write(raw)


class BlobReader:
    """Reads blobs by name; header and sizes are checked once, when opened (see `model.safetensors`)."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError: missing, truncated, or not a safetensors file."""
        self.path = path
        self._file = SafetensorsFile(path)

    def names(self) -> list[str]:
        return list(self._file.entries)

    @property
    def nbytes(self) -> int:
        """Size of the file when it was opened."""
        return self._file.nbytes

    def locate(self, spec: BlobSpec, crc32: int | None = None) -> Piece:
        """Where one blob lies. Raises CheckpointError: absent, or of another dtype or shape than `spec`."""
        self._check(spec)
        return self._file.piece(spec.name, crc32)

    def read(self, spec: BlobSpec, sha256: str | None = None) -> NDArray[Any]:
        """One blob as an array of its shape (bf16 as uint16 bits).

        Raises:
            CheckpointError: absent, of another dtype or shape than `spec`, or its checksum differs.
        """
        self._check(spec)
        raw = self._file.read_bytes(spec.name)
        if sha256 is not None and hashlib.sha256(raw.data).hexdigest() != sha256:
            raise CheckpointError(
                f"Blob '{spec.name}' of '{self.path}' does not match its checksum: the file was changed or damaged. "
                "Copy or make the artifact again."
            )
        return raw.view(_NUMPY[spec.dtype]).reshape(spec.shape)

    def _check(self, spec: BlobSpec) -> None:
        entry = self._file.entries.get(spec.name)
        if entry is None:
            raise CheckpointError(f"'{self.path}' has no blob '{spec.name}'. The artifact is damaged: make it again.")
        if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            raise CheckpointError(
                f"Blob '{spec.name}' of '{self.path}' is {entry.dtype} {entry.shape}; "
                f"the artifact's record says {spec.dtype} {spec.shape}. Make the artifact again."
            )


def _header(blobs: Sequence[BlobSpec]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for blob in blobs:
        end = offset + blob.nbytes
        entries[blob.name] = {"dtype": blob.dtype, "shape": list(blob.shape), "data_offsets": [offset, end]}
        offset = end + -blob.nbytes % BLOB_STEP
        if offset != end:
            padding = {"dtype": "U8", "shape": [offset - end], "data_offsets": [end, offset]}
            entries[f"{blob.name}.padding"] = padding
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % HEADER_STEP)
    return len(text).to_bytes(8, "little") + text
