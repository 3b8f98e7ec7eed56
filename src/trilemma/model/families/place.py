"""Where a canonical tensor lies in a Hugging Face checkpoint: a whole tensor, or some rows of a fused one.

A stored tensor may also be turned (GPT-2 keeps its matrices as (in, out)) or shifted (Gemma keeps a
norm's weight less 1). Reading and writing are exact inverses, except for the rounding of the shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rows:
    """`count` blocks of `block` rows, `stride` apart, the first at `start`, of a tensor of count x stride rows."""

    start: int
    block: int
    stride: int
    count: int = 1

    @property
    def total(self) -> int:
        return self.count * self.stride

    def index(self) -> NDArray[np.intp]:
        """(count x block,) row numbers, ascending."""
        first = self.start + self.stride * np.arange(self.count)
        return (first[:, None] + np.arange(self.block)).reshape(-1)


@dataclass(frozen=True)
class Place:
    """One canonical tensor is `rows` of the stored tensor `name` (turned, if `transposed`), plus `add`."""

    name: str
    rows: Rows | None = None
    transposed: bool = False
    add: float = 0.0

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor, given that of the canonical one."""
        whole = (self.rows.total, *shape[1:]) if self.rows else shape
        return whole[::-1] if self.transposed else whole

    def take(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The canonical tensor's values or bits, before the shift."""
        whole = stored.T if self.transposed else stored
        return np.ascontiguousarray(whole if self.rows is None else whole[self.rows.index()])

    def put(self, part: NDArray[Any], stored: NDArray[Any]) -> None:
        """The inverse: write the canonical tensor's share of the stored one."""
        whole = stored.T if self.transposed else stored
        whole[slice(None) if self.rows is None else self.rows.index()] = part
