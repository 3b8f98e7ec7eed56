"""Sharing the channels of a feed-forward block out among experts, and learning which experts a token needs.

Pure tensor functions. A channel's contribution to a token is |h| x the norm of its column of the way down.
Channels that contribute most go to the shared block; the others are clustered by when and how much they
contribute: balanced k-means, after CMoE (Pei et al. 2025, arXiv:2502.04416), but over the contributions
themselves, so that quiet channels gather in experts that no token needs. Directions alone spread them evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_ROUNDS = 10  # of k-means; memberships stand still earlier
_CLUSTER_TOKENS = 2_048  # that channels are compared on; 8,192 were no better beyond what the seed changes
_FIT_STEPS = 30  # 80 were no better on held-out documents


@dataclass(frozen=True)
class Partition:
    """Channel numbers, ascending: those that always run, and those of each expert (all the same number)."""

    shared: Tensor
    experts: tuple[Tensor, ...]

    @property
    def order(self) -> Tensor:
        """All channels: shared first, then expert by expert."""
        return torch.cat([self.shared, *self.experts])


def partition_channels(contributions: Tensor, count: int, width: int, *, seed: int = 0) -> Partition:
    """Share channels out among `count` experts of `width` channels; what is left over is shared.

    Args:
        contributions: (tokens, channels), not negative.
    """
    energy = contributions.square().mean(0)
    order = torch.argsort(energy, descending=True, stable=True)
    always = contributions.shape[1] - count * width
    shared, routed = order[:always].sort().values, order[always:].sort().values
    seen = contributions[:: max(1, len(contributions) // _CLUSTER_TOKENS), routed]
    points = seen.T / seen.norm(dim=0).mean().clamp(min=1e-30)  # (channels, tokens)
    members = _balanced_clusters(points.cpu(), count, seed)  # many small steps, and random numbers like everywhere
    return Partition(shared, tuple(routed[cluster.to(routed.device)] for cluster in members))


def _balanced_clusters(points: Tensor, count: int, seed: int) -> list[Tensor]:
    """Indices of `count` equally large clusters of points (points, features) near each other, ascending in each."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[_spread_out(points, count, generator)]
    owners = torch.full((len(points),), -1)
    for _ in range(_ROUNDS):
        found = _assign_evenly(points @ centres.T - centres.square().sum(1) / 2)  # the largest is the nearest centre
        if torch.equal(found, owners):
            break
        owners = found
        centres = functional.one_hot(owners, count).T.to(points.dtype) @ points / (len(points) // count)
    return [torch.nonzero(owners == cluster).flatten() for cluster in range(count)]


def _spread_out(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ : first centres far from each other."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distance = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        chosen.append(int(torch.multinomial(distance + 1e-12, 1, generator=generator)))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def _assign_evenly(similarity: Tensor) -> Tensor:
    """The cluster of each point, (points,), all clusters equally large; who has most to lose chooses first."""
    size, count = len(similarity) // similarity.shape[1], similarity.shape[1]
    ranked = similarity.argsort(dim=1, descending=True, stable=True)
    best = similarity.gather(1, ranked)
    regret = best[:, 0] - best[:, min(1, count - 1)]
    room = [size] * count
    owners = torch.empty(len(similarity), dtype=torch.int64)
    for point in torch.argsort(regret, descending=True, stable=True).tolist():
        cluster = next(c for c in ranked[point].tolist() if room[c])
        owners[point] = cluster
        room[cluster] -= 1
    return owners


def expert_energy(contributions: Tensor, partition: Partition) -> Tensor:
    """Squared contribution of each expert to each token, (tokens, experts)."""
    return torch.stack([contributions[:, channels].square().sum(1) for channels in partition.experts], dim=1)


def fit_router(inputs: Tensor, energy: Tensor) -> Tensor:
    """A linear router (experts, dim): softmax regression of each expert's share of a token's energy, by L-BFGS.

    Tokens weigh by their energy. The problem is convex, so no seed matters.

    Args:
        inputs: (tokens, dim), what the block reads. energy: (tokens, experts).
    """
    total = energy.sum(1, keepdim=True)
    wanted = energy / total.clamp(min=1e-30)
    weight = (total / total.mean().clamp(min=1e-30)).flatten()
    router = torch.zeros(energy.shape[1], inputs.shape[1], device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([router], max_iter=_FIT_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = functional.log_softmax(inputs @ router.T, dim=1)
        value = -(weight * (wanted * found).sum(1)).mean() + 1e-4 * router.square().mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return router.detach()


def representatives(hidden: Tensor, energy: Tensor, partition: Partition) -> Tensor:
    """The channel of each expert whose |h| says most about the expert's energy, (experts,): highest correlation."""
    found = []
    for expert, channels in enumerate(partition.experts):
        target = energy[:, expert].sqrt()
        target = target - target.mean()
        values = hidden[:, channels].abs()
        values = values - values.mean(0)
        correlation = (values * target[:, None]).sum(0) / values.norm(dim=0).clamp(min=1e-30)
        found.append(int(channels[int(correlation.argmax())]))
    return torch.tensor(found)


def chosen_experts(scores: Tensor, active: int) -> Tensor:
    """(tokens, experts) bool: the `active` highest scores of each token, ties to the lower index."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :active]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, value=True)


def captured(energy: Tensor, chosen: Tensor) -> float:
    """Share of the routed energy that the chosen experts hold."""
    return float((energy * chosen).sum() / energy.sum().clamp(min=1e-30))


def conditional_least_squares(hidden: Tensor, masked: Tensor, down: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """A way down and a bias that, with some channels silent, come nearest to what all channels gave.

    min over D, b of |hidden down^T - masked (down + D)^T - b|^2 + damping x tokens x mean energy x |D|^2.

    Args:
        hidden: (tokens, channels) of the dense block; masked: the same with silent channels 0.
        down: (dim, channels).

    Returns:
        The new way down (dim, channels) and the bias (dim,).
    """
    missing = (hidden - masked) @ down.T
    mean_in, mean_out = masked.mean(0), missing.mean(0)
    centred = masked - mean_in
    gram = (centred.T @ centred).double()
    gram.diagonal().add_(damping * gram.diagonal().mean().clamp(min=1e-20))
    change = torch.linalg.solve(gram, (centred.T @ (missing - mean_out)).double()).T  # (dim, channels)
    return (down.double() + change).float(), (mean_out.double() - change @ mean_in.double()).float()
