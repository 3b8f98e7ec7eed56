"""What is measured: prefills of some lengths, decodes at some depths and batches, in processes of their own.

A group of cells shares one process of each engine, so that opening (and filling a cache) is paid once; groups are
small, so that a round of all engines stays short and a drifting machine hits all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

PREFILLS = (128, 512, 2048)
DEPTHS = (0, 512, 4096, 16384)
BATCHES = (4, 8, 16)
BATCH_DEPTH = 128  # positions that each sequence of a batch has behind it
DECODED = 64
OPENED = 16  # tokens of the prompt after opening
DEEP = 2048  # filling a cache up to such depths takes longer than decoding there

# what an engine is asked about first: 0 before 1
_RANKS = {
    "prefill 512": 0,
    "decode at 0": 0,
    "decode x8": 1,
    "decode x16": 1,
    "decode at 4096": 2,
    "decode at 16384": 3,
}
_OTHER = 3


@dataclass(frozen=True)
class Cell:
    """One figure: `tokens` of one prompt, or `tokens` steps of `batch` sequences that are `depth` positions long.

    Or opening a file that lies in the page cache, or not (`cold`), up to the first token after `tokens` of a prompt.
    """

    kind: Literal["prefill", "decode", "open"]
    tokens: int
    depth: int = 0
    batch: int = 1
    repeats: int = 2
    cold: bool = False

    @property
    def name(self) -> str:
        if self.kind == "open":
            return f"{'cold' if self.cold else 'warm'} file to first token, 1/s"
        if self.kind == "prefill":
            return f"prefill {self.tokens}"
        return f"decode x{self.batch} at {self.depth}" if self.batch > 1 else f"decode at {self.depth}"

    @property
    def context(self) -> int:
        """Positions that a sequence needs room for, a few to spare."""
        return self.depth + self.tokens + 8

    @property
    def setting(self) -> str:
        """Cells that share the trial of set-ups."""
        if self.batch > 1:
            return "batch"
        return "deep" if self.depth >= DEEP else self.name

    @property
    def rank(self) -> int:
        """0 is measured first."""
        return _RANKS.get(self.name.partition(" at ")[0] if self.batch > 1 else self.name, _OTHER)

    def task(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """Cells of one process; all of one kind, of one rank, and of one batch size above 1."""

    name: str
    cells: tuple[Cell, ...]

    @property
    def rank(self) -> int:
        return self.cells[0].rank


def groups_of(
    max_context: int, *, prefills: Sequence[int] = PREFILLS, depths: Sequence[int] = DEPTHS,
    batches: Sequence[int] = BATCHES, decoded: int = DECODED, repeats: int = 2,
    opening: bool = False,
) -> Iterator[Group | tuple[str, str]]:  # fmt: skip
    """The groups of a model, and (name, reason) for what its context does not hold."""
    asked: list[tuple[str, list[Cell]]] = [
        ("prefill", [Cell("prefill", length, repeats=repeats) for length in prefills]),
        ("open", [Cell("open", OPENED, repeats=1, cold=cold) for cold in (False, True)] if opening else []),
        ("decode", [Cell("decode", decoded, depth, repeats=repeats) for depth in depths if depth < DEEP]),
        ("depth", [Cell("decode", decoded, depth, repeats=repeats) for depth in sorted(depths) if depth >= DEEP]),
        *((f"batch {batch}", [Cell("decode", decoded // 2, BATCH_DEPTH, batch, repeats)]) for batch in batches),
    ]
    for name, cells in asked:
        held = [cell for cell in cells if cell.context <= max_context]
        for rank in sorted({cell.rank for cell in held}):
            yield Group(name, tuple(cell for cell in held if cell.rank == rank))
        for cell in cells:
            if cell not in held:
                yield cell.name, f"the model's context is {max_context}"


__all__ = ["BATCHES", "BATCH_DEPTH", "DECODED", "DEEP", "DEPTHS", "PREFILLS", "Cell", "Group", "groups_of"]
