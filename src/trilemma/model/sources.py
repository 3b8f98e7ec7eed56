"""Where a model's tensors are read from: files of a checkpoint, memory, or a random generator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError
from trilemma.model.config import DecoderConfig
from trilemma.model.families.place import Place
from trilemma.model.located import Located
from trilemma.model.model import Float32, StoredMatrix
from trilemma.model.plain import PlainDtype, PlainMatrix, bf16_to_f32, f32_to_bf16
from trilemma.model.safetensors import SafetensorsFile

PLAIN_OF: dict[str, PlainDtype] = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F64": "f32"}
_CHUNK = 1 << 17  # elements drawn, or searched for NaN, together: little memory beside the tensor


class CheckpointSource:
    """Tensors of safetensors files under Hugging Face's names.

    Args:
        places: canonical name -> (file, place in it); shapes were checked by `read_checkpoint`.
        unknown: tensors that are in the files, are not read, and may matter.
    """

    random = False

    def __init__(self, places: Mapping[str, tuple[SafetensorsFile, Place]], unknown: tuple[str, ...] = ()) -> None:
        self._places = dict(places)
        self.unknown = unknown

    @property
    def files(self) -> list[Path]:
        return sorted({file.path for file, _ in self._places.values()})

    def stored_dtype(self, name: str) -> str:
        file, place = self._place(name)
        dtype = file.entries[place.name].dtype
        if dtype not in PLAIN_OF:
            file.read(place.name)  # raises with the reason
        return PLAIN_OF[dtype]

    def read(self, name: str) -> Float32 | StoredMatrix:
        """2-D f16 and bf16 tensors as PlainMatrix, bit for bit; everything else as f32 values.

        Raises:
            CheckpointError: the tensor has NaN or infinite values, or its file can not be read.
        """
        values = self.as_stored(name)
        place = self._place(name)[1]
        return values + np.float32(place.add) if isinstance(values, np.ndarray) and place.add else values

    def as_stored(self, name: str) -> Float32 | StoredMatrix:
        """`read` before a constant is added (1, to norms that are stored less 1): f32 can not hold 1 + a tiny w."""
        file, place = self._place(name)
        raw = file.read(place.name)
        _refuse_not_finite(raw, place.name, file.path)
        raw = place.take(raw)
        dtype = PLAIN_OF[file.entries[place.name].dtype]
        if raw.ndim == 2 and dtype != "f32":
            return PlainMatrix(dtype, raw)
        return bf16_to_f32(raw) if dtype == "bf16" else raw.astype(np.float32, copy=False)

    def locate(self, name: str) -> Located | None:
        """Whole matrices of f32, f16 and bf16 lie in the file as they are."""
        file, place = self._place(name)
        entry = file.entries[place.name]
        if place.rows is not None or place.transposed or place.add or len(entry.shape) != 2 or entry.dtype == "F64":
            return None
        shape = (entry.shape[0], entry.shape[1])
        dtype, pieces = self.stored_dtype(name), {"values": file.piece(place.name)}
        return Located("rows", dtype, shape, place.name, file.path, file.nbytes, pieces)

    def reading_bytes(self, name: str) -> int:
        """Most bytes held while one tensor is read: the stored one, and its copy where it is a part or turned."""
        file, place = self._place(name)
        entry = file.entries[place.name]
        if place.rows is None and not place.transposed:
            return entry.nbytes
        rows = place.rows
        return entry.nbytes + (entry.nbytes if rows is None else entry.nbytes * rows.block // rows.stride)

    def _place(self, name: str) -> tuple[SafetensorsFile, Place]:
        if name not in self._places:
            raise CheckpointError(f"The checkpoint has no tensor '{name}'. It has {len(self._places)} others.")
        return self._places[name]


class MemorySource:
    """Tensors that are in memory already: a decoder after training, or a test's."""

    random = False

    def __init__(self, tensors: Mapping[str, Float32 | StoredMatrix], dtype: PlainDtype = "f32") -> None:
        self._tensors = dict(tensors)
        self._dtype = dtype

    def stored_dtype(self, name: str) -> str:
        found = self._tensors[name]
        if not isinstance(found, np.ndarray):
            return found.format
        return self._dtype if found.ndim == 1 else "f32"

    def read(self, name: str) -> Float32 | StoredMatrix:
        if name not in self._tensors:
            raise CheckpointError(f"The model has no tensor '{name}'. It has {len(self._tensors)} others.")
        return self._tensors[name]


class RandomSource:
    """Normal weights of standard deviation 0.02 and norms of 1, made when read; for measuring costs only.

    Values depend on the seed and the tensor's name alone. They are drawn from 65,536 quantiles of
    the normal distribution, which makes a billion of them in seconds.
    """

    random = True

    def __init__(self, config: DecoderConfig, seed: int = 0, dtype: PlainDtype = "bf16") -> None:
        self._shapes = config.tensor_shapes()
        self.seed = seed
        self.dtype: PlainDtype = dtype

    def stored_dtype(self, name: str) -> str:
        return self.dtype

    def read(self, name: str) -> Float32 | StoredMatrix:
        if name not in self._shapes:
            raise CheckpointError(f"The config has no tensor '{name}'. It has {len(self._shapes)} others.")
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return np.ones(shape, dtype=np.float32)
        values = self._draw(name, shape, "f32" if len(shape) == 1 else self.dtype)
        if len(shape) == 1 or self.dtype == "f32":
            return values
        return PlainMatrix(self.dtype, values)

    def _draw(self, name: str, shape: tuple[int, ...], dtype: PlainDtype) -> NDArray[Any]:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
        table = _quantiles(dtype)
        values: NDArray[Any] = np.empty(shape, dtype=table.dtype)
        flat = values.reshape(-1)
        for start in range(0, len(flat), _CHUNK):
            part = flat[start : start + _CHUNK]
            codes = np.frombuffer(generator.bytes(2 * len(part)), dtype=np.uint16)
            np.take(table, codes, out=part, mode="clip")
        return values


@cache
def _quantiles(dtype: PlainDtype) -> NDArray[Any]:
    """(65536,) values of 0.02 times a standard normal at evenly spaced probabilities."""
    inverse = NormalDist(sigma=0.02).inv_cdf  # scipy's would add 20 MB to every process that measures memory
    values: NDArray[np.float32] = np.array([inverse((i + 0.5) / 65536) for i in range(65536)]).astype(np.float32)
    tables: dict[PlainDtype, Callable[[], NDArray[Any]]] = {
        "f32": lambda: values,
        "f16": lambda: values.astype(np.float16),
        "bf16": lambda: f32_to_bf16(values),
    }
    return tables[dtype]()


def _refuse_not_finite(raw: NDArray[Any], name: str, path: Path) -> None:
    flat = raw.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        bad = (part & 0x7F80) == 0x7F80 if part.dtype == np.uint16 else ~np.isfinite(part)
        if bad.any():
            index = tuple(int(i) for i in np.unravel_index(start + int(bad.argmax()), raw.shape))
            raise CheckpointError(
                f"Tensor '{name}' in {path} has a NaN or infinite value at {index}. "
                "The checkpoint is damaged or its training diverged: fetch it again or use an earlier one."
            )
