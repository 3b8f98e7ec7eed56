"""The loss that the one training loop is given when a student learns from a teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trilemma.model.decoder import Decoder
from trilemma.techniques.distill.losses import Divergence, chunked_loss, mixed_loss
from trilemma.techniques.distill.teacher import Teacher, head_of

Batch = tuple[Tensor, Tensor]
"""Numbers (batch,) and tokens (batch, context) of windows, as `WindowBatches` gives them."""


class DistillationLoss:
    """weight x divergence(teacher, student) + (1 - weight) x cross-entropy of the text, mean nats a token.

    With weight 0 no teacher is asked, and none is needed.
    """

    def __init__(self, teacher: Teacher | None, weight: float = 1.0, kind: Divergence = "forward") -> None:
        assert teacher is not None or weight == 0
        self.teacher, self.weight, self.kind = teacher, weight, kind

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(module, Decoder)
        numbers, tokens = batch
        inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
        rows = self.teacher.rows(numbers, inputs) if self.teacher is not None and self.weight else None
        hidden = module.final_norm(module.hidden(inputs)).flatten(0, 1)
        return chunked_loss(hidden, head_of(module), mixed_loss(rows, targets, self.weight, self.kind))


def divergence_and_likelihood(module: Decoder, teacher: Teacher, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean KL(teacher || student) and mean negative log-likelihood of the text over fixed batches, nats a token."""
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            for place, weight in enumerate((1.0, 0.0)):
                sums[place] += float(DistillationLoss(teacher, weight)(module, batch)) / len(batches)
    return float(sums[0]), float(sums[1])
