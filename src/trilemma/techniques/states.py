"""Hidden states of all calibration windows, in a file: what is in memory is the batch at hand.

They are the largest thing that calibration needs beside one layer: 128 windows of 512 tokens of a 3B model are 0.8 GB.
A file that was just written lies in the system's cache, which gives way when memory is short.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trilemma.core.errors import CheckpointError, OutputError

_CHUNK = 1 << 22
Shape = tuple[int, int, int]


class States:
    """Hidden states (windows, context, dim) f32, read and written by slices of windows; threads may do so together.

    Raises:
        CheckpointError: the file is shorter than what is asked of it.
        OutputError: it can not be written.
    """

    def __init__(self, path: Path, shape: Shape, device: str | torch.device = "cpu") -> None:
        self.path, self.shape, self.device = path, shape, torch.device(device)
        self._window_bytes = 4 * shape[1] * shape[2]

    def create(self) -> States:
        """Make the file, empty; one that was there goes."""
        with written(self.path):
            self.path.write_bytes(b"")
        return self

    def __getitem__(self, batch: slice) -> Tensor:
        first, last, _ = batch.indices(self.shape[0])
        values = np.empty((max(0, last - first), *self.shape[1:]), np.float32)
        raw = values.reshape(-1).view(np.uint8).data
        with self.path.open("rb", buffering=0) as file:
            file.seek(first * self._window_bytes)
            done = 0
            while done < len(raw):
                count = file.readinto(raw[done:])
                if not count:
                    raise CheckpointError(f"'{self.path}' was cut short. Delete its folder to begin again.")
                done += count
        return torch.from_numpy(values).to(self.device)

    def __setitem__(self, batch: slice, values: Tensor) -> None:
        first, last, _ = batch.indices(self.shape[0])
        array = np.ascontiguousarray(values.detach().to("cpu", torch.float32).numpy())
        assert array.shape == (last - first, *self.shape[1:]), f"{array.shape} for windows {first} to {last}"
        with written(self.path), self.path.open("rb+", buffering=0) as file:
            file.seek(first * self._window_bytes)
            raw = array.reshape(-1).view(np.uint8).data
            done = 0
            while done < len(raw):
                done += file.write(raw[done:])

    def checksum(self) -> int:
        """CRC-32 of what lies in the file."""
        found = 0
        with self.path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                found = zlib.crc32(chunk, found)
        return found

    def settle(self) -> None:
        """Return when the disk has it."""
        with written(self.path), self.path.open("rb+") as file:
            os.fsync(file.fileno())


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Failures to write become an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"Can not write '{path}': {error.strerror or error}. Free space there, or choose another output."
        ) from None
