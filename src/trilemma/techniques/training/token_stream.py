"""Training windows from one flat array of tokens, chosen by (seed, position) alone.

There is no state to save: a resumed run asks for the next position and gets what it would have got.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilemma.core.errors import DataError


class TokenStream:
    """Batches of windows. Each epoch sees every window once, in another order and from another start.

    Args:
        tokens: (n,) integers of any width; a memory-mapped file is read a window at a time.
        batch_size: windows a batch.
        context: tokens that the model sees in a window; each window holds one more, the last target.
        seed: of order and starts.

    Raises:
        DataError: fewer tokens than one window.
    """

    def __init__(self, tokens: NDArray[np.integer], batch_size: int, context: int, seed: int = 0) -> None:
        if tokens.ndim != 1 or len(tokens) < context + 1:
            raise DataError(
                f"Training needs at least {context + 1} tokens in one flat array (context {context} and a target); "
                f"got shape {tuple(tokens.shape)}. Give more text or a shorter context."
            )
        self.tokens, self.batch_size, self.context, self.seed = tokens, batch_size, context, seed
        fitting = (len(tokens) - 1) // context
        self.windows = max(1, fitting - 1)  # one is given up, so that every epoch can start elsewhere
        self._order_of: tuple[int, int, NDArray[np.int64]] | None = None

    @property
    def identity(self) -> str:
        """What decides the batches, in short; a run resumes only on the same stream."""
        ends = np.concatenate([self.tokens[:4096], self.tokens[-4096:]]).astype("<i8")
        digest = hashlib.sha256(ends.tobytes()).hexdigest()[:16]
        return f"{len(self.tokens)} tokens {digest} batch {self.batch_size} context {self.context} seed {self.seed}"

    def __call__(self, position: int) -> Tensor:
        """Batch number `position`: (batch, context + 1) int64."""
        rows = [self._window(position * self.batch_size + row) for row in range(self.batch_size)]
        return torch.from_numpy(np.stack(rows))

    def _window(self, index: int) -> NDArray[np.int64]:
        epoch, place = divmod(index, self.windows)
        shift, order = self._epoch(epoch)
        start = shift + int(order[place]) * self.context
        return self.tokens[start : start + self.context + 1].astype(np.int64)

    def _epoch(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        if self._order_of is None or self._order_of[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            spare = len(self.tokens) - 1 - self.windows * self.context
            shift = int(random.integers(min(spare, self.context) + 1))
            self._order_of = (epoch, shift, random.permutation(self.windows))
        return self._order_of[1], self._order_of[2]
