"""GGUF headers: metadata and the list of tensors, without reading a weight.

Nothing in a file is executed, and every length is checked against the file's size before it is used.
Long arrays (the vocabulary's) are passed over unless asked for by name.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from trilemma.core.errors import CheckpointError
from trilemma.core.record import Record
from trilemma.model.gguf.types import GGML_TYPES

Value = int | float | bool | str | tuple[int | float | bool, ...]

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 1 << 20  # of metadata or tensors: more is damage, not a model
_LONGEST_NAME = 1024  # bytes; GGML itself keeps 64 of a tensor's
_KEPT_ARRAY = 4096  # numbers a layer are kept; scores of a vocabulary are not
_ALIGNMENT = 32
_SHARD = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")


class GgufTensor(Record):
    """One tensor: (out, in) order, experts first where there are some. `offset` is from the start of `file`."""

    shape: tuple[int, ...]
    type: str
    nbytes: int
    offset: int = 0
    file: str = ""


class GgufHeader(Record):
    """`array_lengths` holds every array's length; `metadata` the values of short numeric ones."""

    version: int
    metadata: dict[str, Value]
    array_lengths: dict[str, int]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def weights_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only model in a folder (its first shard); else None.

    Raises:
        CheckpointError: a folder with several GGUF models.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place if place.suffix == ".gguf" or _magic(place) == b"GGUF" else None
    if not place.is_dir() or (place / "config.json").is_file() or (place / "trilemma.json").is_file():
        return None
    found = sorted(place.glob("*.gguf"))
    first = [file for file in found if _SHARD.fullmatch(file.name) or not re.search(r"-of-\d{5}\.gguf$", file.name)]
    if len(first) > 1:
        raise CheckpointError(
            f"'{place}' has {len(first)} GGUF models; name one: {', '.join(f.name for f in first[:4])}."
        )
    return first[0] if first else None


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Metadata and tensor list of a GGUF file, and of its further shards.

    Raises:
        CheckpointError: no GGUF, an unknown version, or a length that can not be true.
    """
    place = Path(path)
    header = _read_one(place)
    shards = _SHARD.fullmatch(place.name)
    if shards is None:
        return header
    tensors = dict(header.tensors)
    for number in range(2, int(shards[2]) + 1):
        tensors |= _read_one(place.with_name(f"{shards[1]}-{number:05d}-of-{shards[2]}.gguf")).tensors
    return header.model_copy(update={"tensors": tensors})


def read_gguf_arrays(path: str | Path, names: Collection[str]) -> dict[str, list[Any]]:
    """Whole arrays of the metadata (the vocabulary's lists and what else is named here), where the file has them.

    Raises:
        CheckpointError: as `read_gguf_header`.
    """
    kept: dict[str, list[Any]] = {}
    _read_one(Path(path), wanted=frozenset(names), kept=kept)
    return kept


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError:
        return b""


def _read_one(path: Path, wanted: frozenset[str] = frozenset(), kept: dict[str, list[Any]] | None = None) -> GgufHeader:
    try:
        with path.open("rb") as file:
            return _Reader(file, path, wanted, {} if kept is None else kept).header()
    except OSError as error:
        raise CheckpointError(f"Can not read '{path}': {error.strerror or error}.") from None


class _Reader:
    """Little-endian values from a file whose size bounds every length. `kept` receives the arrays `wanted`."""

    def __init__(self, file: BinaryIO, path: Path, wanted: frozenset[str], kept: dict[str, list[Any]]) -> None:
        self._file, self._path, self._wanted, self._kept = file, path, wanted, kept
        self._size = self._left = path.stat().st_size

    def header(self) -> GgufHeader:
        if self._take(4) != b"GGUF":
            raise CheckpointError(f"'{self._path}' is no GGUF file.")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise CheckpointError(
                f"'{self._path}' has GGUF version {version}; versions 2 and 3 are read. Convert it again."
            )
        tensors, entries = self._count("tensors"), self._count("metadata")
        metadata: dict[str, Value] = {}
        lengths: dict[str, int] = {}
        for _ in range(entries):
            key = self._string(_LONGEST_NAME)
            value = self._value(int(self._scalar("<I")), key, lengths)
            if value is not None:
                metadata[key] = value
        found = [self._tensor_info() for _ in range(tensors)]
        start = self._data_start(metadata)
        placed = {
            name: tensor.model_copy(update={"offset": start + tensor.offset, "file": str(self._path)})
            for name, tensor in found
        }
        return GgufHeader(version=int(version), metadata=metadata, array_lengths=lengths, tensors=placed)

    def _data_start(self, metadata: dict[str, Value]) -> int:
        """Where the tensors' data begins: behind the header, aligned."""
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise CheckpointError(f"'{self._path}': alignment {alignment!r} is no power of two: the file is damaged.")
        return -(-(self._size - self._left) // alignment) * alignment

    def _take(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise CheckpointError(f"'{self._path}' ends inside its header: it is damaged or cut. Fetch it again.")
        return self._file.read(size)

    def _skip(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise CheckpointError(f"'{self._path}' ends inside its header: it is damaged or cut. Fetch it again.")
        self._file.seek(size, 1)

    def _scalar(self, form: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _count(self, what: str) -> int:
        count = int(self._scalar("<Q"))
        if count > _MOST_ENTRIES:
            raise CheckpointError(f"'{self._path}' claims {count} {what}: it is damaged. Fetch it again.")
        return count

    def _string(self, most: int = 1 << 63) -> str:
        size = int(self._scalar("<Q"))
        if size > most:
            raise CheckpointError(f"'{self._path}' has a name of {size} bytes: it is damaged. Fetch it again.")
        return self._take(size).decode("utf-8", errors="replace")

    def _value(self, kind: int, key: str, lengths: dict[str, int]) -> Value | None:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(f"'{self._path}': metadata '{key}' has the unknown type {kind}.")
        inner, count = int(self._scalar("<I")), int(self._scalar("<Q"))
        lengths[key] = count
        if inner == _STRING:
            self._strings(key, count)
            return None
        if inner not in _SCALARS:
            raise CheckpointError(f"'{self._path}': array '{key}' has the unknown type {inner}.")
        size = struct.calcsize(_SCALARS[inner])
        if count > _KEPT_ARRAY and key not in self._wanted:
            self._skip(count * size)
            return None
        values = struct.unpack(f"<{count}{_SCALARS[inner][1]}", self._take(count * size))
        if key in self._wanted:
            self._kept[key] = list(values)
        return values if count <= _KEPT_ARRAY else None

    def _strings(self, key: str, count: int) -> None:
        if 8 * count > self._left:
            raise CheckpointError(f"'{self._path}': array '{key}' claims {count} strings: the file is damaged.")
        if key in self._wanted:
            self._kept[key] = [self._string() for _ in range(count)]
            return
        for _ in range(count):
            self._skip(int(self._scalar("<Q")))

    def _tensor_info(self) -> tuple[str, GgufTensor]:
        name, dimensions = self._string(_LONGEST_NAME), int(self._scalar("<I"))
        if not 1 <= dimensions <= 4:
            raise CheckpointError(f"'{self._path}': tensor '{name}' has {dimensions} dimensions; 1 to 4 are possible.")
        sizes = [int(self._scalar("<Q")) for _ in range(dimensions)]
        kind = int(self._scalar("<I"))
        offset = int(self._scalar("<Q"))
        if kind not in GGML_TYPES:
            raise CheckpointError(f"'{self._path}': tensor '{name}' has the GGML type {kind}, which is not known here.")
        type_name, block, size = GGML_TYPES[kind]
        values = math.prod(sizes)
        if not values or sizes[0] % block or values >= 1 << 48:
            raise CheckpointError(
                f"'{self._path}': tensor '{name}' of type {type_name} can not have the sizes {sizes}."
            )
        shape = tuple(reversed(sizes))
        return name, GgufTensor(shape=shape, type=type_name, nbytes=values // block * size, offset=offset)
