"""Statistics of what enters the matrices of one layer, while all calibration windows go through it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from trilemma.core.errors import RecipeError
from trilemma.model.config import DecoderConfig, is_low_rank
from trilemma.model.decoder import DecoderLayer
from trilemma.model.model import LinearRun
from trilemma.techniques.products import prepare_products
from trilemma.techniques.states import States
from trilemma.techniques.technique import Build
from trilemma.techniques.threads import Task, by_batches

_STRIPE = 256  # rows of X^T X that one thread adds to at a time
_INPUTS = {**dict.fromkeys(("q", "k", "v", "gate", "up", "router"), "in"), "o": "o", "down": "down"}
Group = tuple[str, ...]


class Gram:
    """X^T X of all inputs (tokens, in) that a matrix saw, how many there were, their sum and largest |x| by column.

    every: keep each so-many-th input in `rows` too; 0 keeps none.
    """

    def __init__(self, columns: int, device: str | torch.device = "cpu", every: int = 0) -> None:
        self.matrix = torch.zeros(columns, columns, device=device)
        self.largest = torch.zeros(columns, device=device)
        self.total = torch.zeros(columns, device=device)
        self.tokens = 0
        self.every, self._kept = every, list[Tensor]()

    @property
    def rows(self) -> Tensor:
        """The inputs that were kept, (rows, in)."""
        return torch.cat(self._kept) if self._kept else self.matrix[:0]

    def update(self, x: Tensor) -> None:
        """Add inputs x (..., in)."""
        for task in self.tasks(x):
            task()
        self.close()

    def tasks(self, x: Tensor | None) -> list[Task]:
        """What adds the inputs x (..., in) when all of it is done, `close` at last; as many tasks where x is None."""
        flat = self.matrix[:0] if x is None else x.reshape(-1, x.shape[-1]).float()
        return [lambda: self._look(flat), *stripes(self.matrix, flat, flat, symmetric=True)]

    def close(self) -> None:
        """Fill the half of the matrix that is the other's mirror image."""
        for first in range(0, len(self.matrix), _STRIPE):
            last = first + _STRIPE
            self.matrix[last:, first:last] = self.matrix[first:last, last:].T
            corner = self.matrix[first:last, first:last]
            corner.copy_(corner.triu() + corner.triu(1).T)

    def hessian(self) -> Tensor:
        """H = 2 X^T X / tokens, (in, in): of the mean squared output error of one row."""
        return self.matrix * (2.0 / max(1, self.tokens))

    def _look(self, flat: Tensor) -> None:
        if len(flat):
            largest = torch.maximum(flat.amax(0), -flat.amin(0))  # `aminmax` is ten times slower
            self.largest = torch.maximum(self.largest, largest)
            self.total += flat.sum(0)
        if self.every:
            self._kept.append(flat[:: self.every].clone())
        self.tokens += flat.shape[0]


def stripes(matrix: Tensor, left: Tensor, right: Tensor, *, symmetric: bool = False) -> list[Task]:
    """Tasks that add left^T right to `matrix`, rows by rows; the upper half alone where it is symmetric."""

    def add(first: int) -> None:
        rows, start = slice(first, first + _STRIPE), first if symmetric else 0
        matrix[rows, start:].addmm_(left[:, rows].T, right[:, start:])

    return [partial(add, first) for first in range(0, len(matrix), _STRIPE)]


def gather(
    layer: DecoderLayer,
    index: int,
    config: DecoderConfig,
    hidden: States,
    runs: Mapping[str, LinearRun],
    build: Build,
    roles: Collection[str] | None = None,
    every: int = 0,
) -> dict[str, Gram]:
    """The Gram of every matrix of the layer (in these roles); matrices with the same input share one."""
    groups = [
        group
        for group in input_groups(config, index)
        if roles is None or any(name.split(".")[-2] in roles for name in group)
    ]
    if not groups:
        return {}
    prepare_products(layer, index, runs)
    grams = {group: Gram(linear_of(layer, group[-1]).in_features, build.device, every) for group in groups}

    with captured(layer, groups) as capture:

        def look(batch: slice) -> Sequence[Task]:
            seen = capture(lambda: layer(hidden[batch]), stop=True)
            return [task for group, gram in grams.items() for task in gram.tasks(seen.get(group))]

        by_batches(look, *hidden.shape[:2], build.threads)
    for group, gram in grams.items():
        gram.close()
        refuse_not_finite(group, gram)
    return {name: gram for group, gram in grams.items() for name in group}


def advance(
    layer: DecoderLayer, index: int, hidden: States, behind: States, runs: Mapping[str, LinearRun], build: Build
) -> None:
    """Take hidden states through the layer."""
    prepare_products(layer, index, runs)

    def through(batch: slice) -> Sequence[Task]:
        behind[batch] = layer(hidden[batch])
        return ()

    by_batches(through, *hidden.shape[:2], build.threads)


def refuse_not_finite(group: Group, gram: Gram) -> None:
    """Raises RecipeError naming the matrix."""
    if not torch.isfinite(gram.matrix.diagonal()).all() or not torch.isfinite(gram.total).all():
        raise RecipeError(f"The inputs of '{group[0]}' are not finite on the calibration text. Use bf16 here.")


def input_groups(config: DecoderConfig, index: int) -> list[Group]:
    """Matrices of a layer that see the same input, in order of execution: (q, k, v), (o), (gate, up), (down).

    Of experts, (router, shared gate, shared up), (shared down), then each expert's (gate, up) and (down): its
    inputs are those of the tokens that chose it, and may be none.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in config.linear_names():
        if name.startswith(f"layers.{index}.") and not is_low_rank(name):
            block, role = name.removesuffix(".weight").rsplit(".", 1)
            kind = _INPUTS[role]
            if kind == "in":
                block = block.removesuffix(".shared")  # the shared block reads what the router reads
            groups.setdefault((block, kind), []).append(name)
    return [tuple(group) for group in groups.values()]


def linear_of(layer: DecoderLayer, name: str) -> nn.Linear:
    _, _, path = name.removesuffix(".weight").split(".", 2)
    found = layer.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found


class _Stop(Exception):  # noqa: N818
    """Nothing behind this product is needed."""


Capture = Callable[..., dict[Group, Tensor]]


@contextmanager
def captured(layer: DecoderLayer, groups: Iterable[Group]) -> Iterator[Capture]:
    """Yields `capture(run, stop=...)`: what enters each group of matrices (the last of it: the first may be a router,
    never rounded) while `run()` is under way; where `stop`, it ends as soon as all groups were seen."""
    groups = list(groups)
    mine = threading.local()

    def see(group: Group, x: Tensor) -> None:
        mine.seen[group] = x
        if mine.stop and len(mine.seen) == len(groups):
            raise _Stop

    def capture(run: Callable[[], object], *, stop: bool) -> dict[Group, Tensor]:
        mine.seen, mine.stop = {}, stop
        with suppress(_Stop):
            run()
        seen: dict[Group, Tensor] = mine.seen
        mine.seen = {}
        return seen

    hooks = [
        linear_of(layer, group[-1]).register_forward_pre_hook(lambda _, args, group=group: see(group, args[0]))
        for group in groups
    ]
    try:
        yield capture
    finally:
        for hook in hooks:
            hook.remove()
