"""The safetensors file format: a checked header, one tensor at a time, and a writer that streams.

    8 bytes little-endian header length | JSON header, padded with spaces | tensor data

Reading is ours and not the package's because headers come from strangers (every offset is checked
against the real file before anything is read), because bf16 must reach numpy as raw bits, and
because reads (not maps) turn a file that shrinks into an error instead of a signal.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError
from trilemma.model.located import Piece

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_NUMPY: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64}
_WRITTEN: dict[str, Any] = _NUMPY | {"I8": np.int8, "I32": np.int32, "I64": np.int64}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format itself
_ALIGNMENT = 64
_AGAIN = "The file is damaged or the download was cut off: fetch it again."


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` is the absolute byte offset."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """A file whose header was read and checked; tensors are read on demand.

    Raises:
        CheckpointError: unreadable, truncated, or a header that contradicts itself or the file's size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.nbytes = os.fstat(file.fileno()).st_size
                self.entries, self.metadata = _read_header(path, file.read, self.nbytes)
        except OSError as error:
            raise CheckpointError(f"Can not read {path}: {error.strerror or error}.") from None

    def piece(self, name: str, crc32: int | None = None) -> Piece:
        """Where one tensor's bytes lie."""
        entry = self.entries[name]
        return Piece(entry.start, entry.nbytes, crc32)

    def read(self, name: str) -> NDArray[Any]:
        """The stored values of one tensor: f32, f16, f64, or uint16 bits of bf16.

        Raises:
            CheckpointError: another dtype, or the file changed since it was opened.
        """
        entry = self.entries[name]
        if entry.dtype not in _NUMPY:
            raise CheckpointError(
                f"Tensor '{name}' in {self.path} has dtype {entry.dtype}; weights must be F32, F16 or BF16. "
                "Convert the checkpoint to bf16 first."
            )
        values: NDArray[Any] = self.read_bytes(name).view(_NUMPY[entry.dtype]).reshape(entry.shape)
        return values

    def read_bytes(self, name: str) -> NDArray[np.uint8]:
        """The bytes of one tensor as they lie in the file, whatever its dtype; errors as of `read`."""
        entry = self.entries[name]
        raw = np.empty(entry.nbytes, dtype=np.uint8)
        if entry.nbytes:
            self._read_into(raw.data, entry.start, name)
        return raw

    def _read_into(self, buffer: memoryview, start: int, name: str) -> None:
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                done = 0
                while done < len(buffer):
                    count = file.readinto(buffer[done : done + (1 << 28)])
                    if not count:
                        raise CheckpointError(f"{self.path} ends inside tensor '{name}'. {_AGAIN}")
                    done += count
        except OSError as error:
            raise CheckpointError(
                f"Can not read tensor '{name}' from {self.path}: {error.strerror or error}."
            ) from None


def _read_header(path: Path, read: Callable[[int], bytes], size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    head = read(8)
    if len(head) < 8:
        raise CheckpointError(f"{path} has {len(head)} bytes, too few for a safetensors file. {_AGAIN}")
    length = int.from_bytes(head, "little")
    if length > _MAX_HEADER_BYTES or length < 2:
        raise CheckpointError(f"{path} is no safetensors file: its header would have {length} bytes.")
    if 8 + length > size:
        raise CheckpointError(f"{path} ends inside its header ({size} of {8 + length} bytes). {_AGAIN}")
    try:
        header = json.loads(read(length), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON ({error}). {_AGAIN}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is no JSON object. {_AGAIN}")
    metadata = header.pop("__metadata__", None) or {}
    entries = {name: _entry(path, name, raw, 8 + length, size) for name, raw in header.items()}
    _refuse_overlap(path, entries)
    return entries, metadata if isinstance(metadata, dict) else {}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, raw: Any, base: int, size: int) -> Entry:
    if not isinstance(raw, dict) or not {"dtype", "shape", "data_offsets"} <= raw.keys():
        raise CheckpointError(
            f"{path}: the header entry of tensor '{name}' lacks dtype, shape or data_offsets. {_AGAIN}"
        )
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{path}: tensor '{name}' has the unknown dtype {dtype!r}. Known: {', '.join(_BITS)}.")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise CheckpointError(f"{path}: tensor '{name}' has the shape {shape!r}; expected a list of sizes. {_AGAIN}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: tensor '{name}' has bad data_offsets {offsets!r}. {_AGAIN}")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * _BITS[dtype] != nbytes * 8:
        raise CheckpointError(
            f"{path}: tensor '{name}' of shape {shape} and dtype {dtype} does not fit its {nbytes} bytes. {_AGAIN}"
        )
    if base + offsets[1] > size:
        raise CheckpointError(
            f"{path} is truncated: tensor '{name}' ends at byte {base + offsets[1]}, the file at {size}. {_AGAIN}"
        )
    return Entry(dtype, tuple(shape), base + offsets[0], nbytes)


def _refuse_overlap(path: Path, entries: Mapping[str, Entry]) -> None:
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.nbytes and entry.start < end:
            raise CheckpointError(f"{path}: tensors '{before}' and '{name}' overlap. {_AGAIN}")
        end, before = entry.start + entry.nbytes, name


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: `load` is called when its turn comes, and must fit dtype and shape."""

    name: str
    dtype: str  # F32, F16, BF16, I8, I32 or I64
    shape: tuple[int, ...]
    load: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def write_safetensors(path: Path, tensors: Iterable[Planned], metadata: Mapping[str, str]) -> None:
    """Write tensors one after another, each aligned to 64 bytes of the file where the format lets us.

    The header is padded so that the data starts aligned; the format forbids gaps between tensors,
    so a tensor whose size is no multiple of 64 bytes moves those behind it. Odd ones go last.
    """
    planned = sorted(tensors, key=lambda item: item.nbytes % _ALIGNMENT != 0)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for item in planned:
        header[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.nbytes],
        }
        offset += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for item in planned:
            values = item.load()
            if values.dtype != _WRITTEN[item.dtype] or values.shape != item.shape:
                raise AssertionError(
                    f"{item.name}: planned {item.dtype} {item.shape}, got {values.dtype} {values.shape}"
                )
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
