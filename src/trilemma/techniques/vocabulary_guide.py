"""How far the model's answers move with each row of the embedding and of the head.

A head's row v gives token v its logit, so an error d of it costs E[p (1 - p) (d^T h)^2] / 2 nats a token, with h what
the head reads and p the model's own probability of v: E[p (1 - p) h h^T], weight and direction of which are the row's
own. Rows are too many for a matrix each. Shared is what h varies by around each row's mean, as in discriminant
analysis; the means are kept. An embedding's row is an input: its error costs d^T E[g g^T] d, g the gradient of the
model's answers at what enters the first layer. A tied row costs both.
"""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from trilemma.core.environment import usable_cores
from trilemma.core.errors import CheckpointError
from trilemma.techniques.states import written
from trilemma.techniques.threads import side_by_side

_MOST_MEANS_BYTES = 1 << 28  # beside a head that is whole in f32
_FILE = "vocabulary.npz"
_MOST_CHANCES = 1 << 24  # that are computed together: tokens x vocabulary


class VocabularyGuide:
    """Sums over `tokens` positions; everything in f32.

    spread: (dim, dim) of p (1 - p) h h^T over tokens and rows; weights: (vocab,) of p (1 - p); sums: (vocab, dim) of
    p (1 - p) h, or None where they would take over 268 MB; entering: (dim, dim) of g g^T.
    """

    def __init__(self, vocabulary: int, dim: int, device: str | torch.device = "cpu") -> None:
        self.tokens = 0
        self.spread = torch.zeros(dim, dim, device=device)
        self.entering = torch.zeros(dim, dim, device=device)
        self.weights = torch.zeros(vocabulary, device=device)
        self.sums = torch.zeros(vocabulary, dim, device=device) if 4 * vocabulary * dim <= _MOST_MEANS_BYTES else None

    def read_answers(self, h: Tensor, head: Tensor, threads: int | None) -> None:
        """Add what the head (vocab, dim) makes of its inputs h (tokens, dim): rows are shared out among threads."""
        step = -(-len(head) // (threads or usable_cores()))
        parts = [slice(first, first + step) for first in range(0, len(head), step)]
        certain = torch.zeros(len(h), device=h.device)
        together = max(1, _MOST_CHANCES // len(head))
        for first in range(0, len(h), together):
            some = h[first : first + together]

            def answer(rows: slice, some: Tensor = some) -> Tensor:
                return some @ head[rows].T

            logits = side_by_side(answer, parts, threads)
            total = torch.stack([each.logsumexp(1) for each in logits]).logsumexp(0)

            def read(part: tuple[slice, Tensor], some: Tensor = some, total: Tensor = total) -> Tensor:
                rows, logits = part
                chances = (logits - total[:, None]).exp_()
                sure = chances.square().sum(1)
                chances -= chances.square()
                self.weights[rows] += chances.sum(0)
                if self.sums is not None:
                    self.sums[rows].addmm_(chances.T, some)
                return sure

            sure = side_by_side(read, zip(parts, logits, strict=True), threads)
            certain[first : first + together] = torch.stack(sure).sum(0)
        self.spread.addmm_((h * (1 - certain)[:, None]).T, h)
        self.tokens += len(h)

    def read_entering(self, gradient: Tensor) -> None:
        """Add gradients (..., dim) at what enters the first layer."""
        flat = gradient.reshape(-1, gradient.shape[-1])
        self.entering.addmm_(flat.T, flat)

    def save(self, folder: Path) -> None:
        """Keep the sums in a folder. Raises OutputError."""
        with written(folder):
            arrays = {name: tensor.cpu().numpy() for name, tensor in self._tensors().items()}
            np.savez(folder / _FILE, allow_pickle=False, tokens=np.array(self.tokens), **arrays)

    def load(self, folder: Path) -> None:
        """Go on from what `save` has kept. Raises CheckpointError."""
        try:
            with np.load(folder / _FILE) as kept:
                self.tokens = int(kept["tokens"])
                for name, tensor in self._tensors().items():
                    tensor.copy_(torch.from_numpy(kept[name]))
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise CheckpointError(
                f"'{folder / _FILE}' is damaged ({error}). Delete '{folder.parent}' to begin again."
            ) from None

    def _tensors(self) -> dict[str, Tensor]:
        found = {"spread": self.spread, "entering": self.entering, "weights": self.weights}
        return found if self.sums is None else {**found, "sums": self.sums}

    def head(self) -> tuple[Tensor, Tensor | None]:
        """A row's H (dim, dim) and its direction m (vocab, dim), H + m m^T its Hessian: for rows of equal weight."""
        whole = self.spread / self.weights.sum()
        if self.sums is None:
            return whole, None
        means = self.sums / self.weights.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return whole - self.sums.T @ means / self.weights.sum(), means

    def embedding(self) -> Tensor:
        """H (dim, dim) of an embedding's row where a token looks it up."""
        return self.entering / self.tokens

    def tied(self) -> tuple[Tensor, Tensor | None]:
        """As `head`, of a row that is looked up as often as the model expects it."""
        hessian, directions = self.head()
        return hessian + self.entering / self.weights.sum(), directions
