"""Batches of whole calibration windows, each with its number, so that what a teacher said about it can be kept."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilemma.core.errors import DataError


class WindowBatches:
    """position -> (numbers (batch,), tokens (batch, context)), both int64; every epoch in another order.

    Args:
        windows: (n, context) token ids; may be a memory-mapped file.
        batch_size: windows a batch; n when that is smaller.
        seed: of the order.

    Raises:
        DataError: no window, or windows of fewer than two tokens.
    """

    def __init__(self, windows: NDArray[np.integer], batch_size: int, seed: int = 0) -> None:
        if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
            raise DataError(
                f"Training needs windows of at least two tokens, (n, context); got shape {tuple(windows.shape)}. "
                "Give more text."
            )
        self.windows, self.seed = windows, seed
        self.batch_size = min(batch_size, len(windows))
        self._order_of: tuple[int, NDArray[np.int64]] | None = None

    @property
    def identity(self) -> str:
        """What decides the batches; a run resumes only on the same windows."""
        digest = hashlib.sha256(np.ascontiguousarray(self.windows).tobytes()).hexdigest()[:16]
        return f"{self.windows.shape} windows {digest} batch {self.batch_size} seed {self.seed}"

    def __call__(self, position: int) -> tuple[Tensor, Tensor]:
        first = position * self.batch_size
        numbers = np.asarray([self._number(first + row) for row in range(self.batch_size)], np.int64)
        return torch.from_numpy(numbers), torch.from_numpy(self.windows[numbers].astype(np.int64))

    def _number(self, index: int) -> int:
        epoch, place = divmod(index, len(self.windows))
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.windows)))
        return int(self._order_of[1][place])


def pieces(windows: NDArray[np.int32], context: int) -> NDArray[np.int32]:
    """Windows (n, length) cut into (m, context) where length is more; what is left over of each is not used."""
    length = windows.shape[1]
    if length <= context:
        return windows
    whole = length // context
    return np.ascontiguousarray(windows[:, : whole * context]).reshape(-1, context)
