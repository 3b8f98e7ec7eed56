"""Which single weights go: the least of each row or matrix, or n of every m; and how the others make up for it.

Pure tensor functions. Matrices are (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.core.errors import RecipeError
from trilemma.techniques.quantize.gptq import inverse_factor


@dataclass(frozen=True)
class Pattern:
    """`zeros` of every `of` weights along a row, such as 2 of 4."""

    zeros: int
    of: int

    @classmethod
    def read(cls, text: str) -> Pattern:
        """'2:4' -> two of four. Raises ValueError when it is none."""
        zeros, colon, of = text.partition(":")
        if not (colon and zeros.isdigit() and of.isdigit() and 0 < int(zeros) < int(of) <= 64):
            raise ValueError(f"a pattern is zeros:group such as 2:4 or 4:8, not '{text}'")
        return cls(int(zeros), int(of))

    @property
    def share(self) -> float:
        return self.zeros / self.of


def lowest_per_row(scores: Tensor, share: float) -> Tensor:
    """True (out, in) at the int(share x in) lowest scores of each row; ties go to the lower index."""
    count = int(share * scores.shape[1] + 1e-9)
    order = torch.argsort(scores, dim=1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], value=True)


def lowest_of_all(scores: Tensor, share: float) -> Tensor:
    """True (out, in) at the lowest int(share x out x in) scores of the whole matrix."""
    return lowest_per_row(scores.reshape(1, -1), share).reshape(scores.shape)


def lowest_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """True (out, in) at the lowest `zeros` of every `of` neighbours in a row; an incomplete last group stays whole."""
    rows, columns = scores.shape
    whole = columns - columns % pattern.of
    order = torch.argsort(scores[:, :whole].reshape(rows, -1, pattern.of), dim=2, stable=True)
    mask = torch.zeros(order.shape, dtype=torch.bool, device=scores.device)
    mask.scatter_(2, order[:, :, : pattern.zeros], value=True)
    full = torch.zeros_like(scores, dtype=torch.bool)
    full[:, :whole] = mask.reshape(rows, whole)
    return full


def remaining_weights(weight: Tensor, hessian: Tensor, mask: Tensor, *, damping: float = 0.01) -> Tensor:
    """`weight` with zeros where `mask` is True and the error of each passed on to the columns behind it.

    The update of SparseGPT (Frantar and Alistarh, 2023, arXiv:2301.00774) for a mask that is given: column
    by column with the inverse Hessian's factor, as GPTQ does it. All (out, in) but the Hessian (in, in).

    Raises:
        RecipeError: a Hessian that no damping makes positive.
    """
    upper = inverse_factor(hessian, damping)
    rest = weight.to(hessian.dtype).clone()
    for column in range(rest.shape[1]):
        error = torch.where(mask[:, column], rest[:, column], 0) / upper[column, column]
        rest[:, column:] -= error[:, None] * upper[column, column:]
        rest[mask[:, column], column] = 0
    if not torch.isfinite(rest).all():
        raise RecipeError("Pruned weights are not finite. Use other calibration text or more of it.")
    return rest.to(weight.dtype)
