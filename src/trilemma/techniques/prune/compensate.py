"""Removing inputs of a matrix so that its outputs change least, and letting the inputs that stay make up for it.

Pure tensor functions in f64. A matrix W (out, in) sees inputs X (tokens, in), known by their Gram G = X^T X.
Removing the columns R and updating the others K costs in squared output error, at best,

    tr(W_R (G^-1)_RR^-1 W_R^T),    with W'_K = W G_K (G_KK)^-1

(Optimal Brain Surgeon, Hassibi and Stork 1993; by structures and one after another: ZipLM, Kurtic et al. 2023,
arXiv:2302.04089). Where the output may have a bias, G is centred: the bias then carries the means (FLAP,
An et al. 2023, arXiv:2312.11983, uses the bias alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.core.errors import RecipeError
from trilemma.techniques.calibration import Gram

_ROUNDS = 128  # removals between two updates of the scores are so many that a whole matrix takes this many rounds


@dataclass(frozen=True)
class Elimination:
    """Blocks of columns in the order in which they go, by rounds.

    order: block numbers of each round; errors: squared output error after each round, starting with 0
    before the first, as a mean over tokens.
    """

    order: tuple[tuple[int, ...], ...]
    errors: tuple[float, ...]

    def first(self, rounds: int) -> list[int]:
        """Blocks that are gone after so many rounds."""
        return sorted(block for gone in self.order[:rounds] for block in gone)


def mean_gram(gram: Gram, *, centred: bool) -> Tensor:
    """X^T X / tokens (in, in) in f64; centred: the covariance."""
    tokens = max(1, gram.tokens)
    matrix = gram.matrix.double() / tokens
    if centred:
        mean = gram.total.double() / tokens
        matrix = matrix - torch.outer(mean, mean)
    return matrix


def damped(gram: Tensor, damping: float) -> Tensor:
    """G + damping x mean(diag G) I: what keeps weights near their old values where the text says nothing."""
    mean = gram.diagonal().mean()
    if not torch.isfinite(mean):
        raise RecipeError("The calibration statistics are not finite. Use other calibration text.")
    return gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (damping * mean).clamp(min=1e-20)


def least_squares(weight: Tensor, gram: Tensor, keep: Tensor, *, damping: float = 1e-4) -> Tensor:
    """The columns `keep` (n,) of `weight`, updated: W G[:, keep] G[keep, keep]^-1, damped; (out, n) f64."""
    positive = damped(gram, damping)
    lower = torch.linalg.cholesky(positive[keep][:, keep])
    return torch.cholesky_solve(positive[keep] @ weight.double().T, lower).T


def output_error(weight: Tensor, gram: Tensor, keep: Tensor, kept: Tensor) -> float:
    """Mean squared error of the outputs, summed over them, when columns `keep` hold `kept` and the others are gone."""
    change = weight.double().clone()
    change[:, keep] -= kept.double()
    return float(((change @ gram) * change).sum())


def bias_shift(weight: Tensor, mean: Tensor, keep: Tensor, kept: Tensor) -> Tensor:
    """What a bias must add (out,) so that the mean output over the calibration text stays; `mean` is (in,)."""
    mean = mean.double()
    return weight.double() @ mean - kept.double() @ mean[keep]


def eliminate(
    weight: Tensor,
    gram: Tensor,
    block: int,
    steps: Sequence[int],
    *,
    groups: Tensor | None = None,
    damping: float = 1e-4,
) -> Elimination:
    """Remove blocks of `block` neighbouring columns, each time those that cost least after the update of the others.

    Args:
        weight: (out, in), in = blocks x block.
        gram: (in, in) f64, see `mean_gram`.
        steps: how many blocks go in each round.
        groups: (blocks,) group of each block; a round then takes so many blocks from each group.
    """
    rest = weight.double().clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damping)))
    alive = torch.arange(rest.shape[1] // block, device=rest.device)
    most = max(1, len(alive) // _ROUNDS)
    errors, order = [0.0], []
    for step in steps:
        error, gone = 0.0, []
        for count in [min(most, step - first) for first in range(0, step, most)]:
            scores = _scores(rest, inverse, block, alive)
            chosen = _cheapest(scores, count, None if groups is None else groups[alive])
            error += _remove(rest, inverse, columns_of(alive[chosen], block))
            gone += alive[chosen].tolist()
            staying = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
            staying[chosen] = False
            alive = alive[staying]
        order.append(tuple(gone))
        errors.append(errors[-1] + max(0.0, error))
    return Elimination(tuple(order), tuple(errors))


def columns_of(blocks: Tensor, block: int) -> Tensor:
    """Columns (len(blocks) x block,) of these blocks."""
    return (blocks[:, None] * block + torch.arange(block, device=blocks.device)).reshape(-1)


def _scores(rest: Tensor, inverse: Tensor, block: int, alive: Tensor) -> Tensor:
    """Error of removing each living block alone, (blocks,)."""
    if block == 1:
        return rest.square().sum(0)[alive] / inverse.diagonal()[alive]
    found = []
    for columns in columns_of(alive, block).reshape(len(alive), block):
        weights = rest[:, columns].T  # (block, out)
        found.append((weights * torch.linalg.solve(inverse[columns][:, columns], weights)).sum())
    return torch.stack(found)


def _cheapest(scores: Tensor, count: int, groups: Tensor | None) -> Tensor:
    """Positions of the `count` lowest scores, or of those of each group; ascending."""
    order = torch.argsort(scores, stable=True)
    if groups is None:
        return order[:count].sort().values
    taken = [order[groups[order] == group][:count] for group in sorted(set(groups.tolist()))]
    return torch.cat(taken).sort().values


def _remove(rest: Tensor, inverse: Tensor, gone: Tensor) -> float:
    """Take the columns `gone` out of the weights and the inverse Gram, in place; returns the squared error.

    Nothing moves: what was removed is left behind as rounding noise around zero, and is never read again.
    """
    weights = rest[:, gone]  # (out, gone)
    solved = torch.linalg.solve(inverse[gone][:, gone], torch.cat((weights.T, inverse[gone]), dim=1))
    by_weight, by_inverse = solved[:, : len(rest)], solved[:, len(rest) :]
    rest.addmm_(weights, by_inverse, alpha=-1)
    inverse.addmm_(inverse[:, gone], by_inverse, alpha=-1)
    return float((weights.T * by_weight).sum())
