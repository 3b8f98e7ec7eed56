"""Scales for codes that are chosen: least tr(G E H E^T), E the matrix's error, over all scales and minima at once.

A least-squares problem with out x groups unknowns, solved by conjugate gradients with the diagonal as preconditioner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MOST_STEPS = 20
_ENOUGH = 1e-10  # of the first residual, squared


def refit_scales(
    weight: Tensor, basis: Sequence[Tensor], hessian: Tensor, moment: Tensor | None, start: Tensor, size: int
) -> Tensor:
    """Factors x (len(basis), out, groups) of groups of `size` inputs, such that sum of x basis is closest to `weight`.

    Args:
        weight, basis: (out, in) each: codes for a scale, ones for a minimum.
        hessian: (in, in), damped.
        moment: (out, out), damped; None where rows are on their own.
        start: the factors to begin with; the result has no more error than these.
    """
    groups = start.shape[2]
    members = torch.arange(weight.shape[1], device=weight.device) // size

    def weighed(error: Tensor) -> Tensor:
        inward = error @ hessian
        return inward if moment is None else moment @ inward

    def gathered(values: Tensor) -> Tensor:
        return torch.zeros_like(start).index_add_(2, members, torch.stack([values * each for each in basis]))

    def spread(x: Tensor) -> Tensor:
        return torch.stack([part[:, members] * each for part, each in zip(x, basis, strict=True)]).sum(0)

    x = start
    steep = torch.stack([_steepness(each, hessian, moment, members, groups) for each in basis])
    steep = steep.clamp(min=max(float(steep.mean()) * 1e-6, torch.finfo(steep.dtype).tiny))
    residual = gathered(weighed(weight - spread(x)))
    direction = residual / steep
    left = first = (residual * direction).sum()
    for _ in range(_MOST_STEPS):
        if not left > _ENOUGH * first:
            break
        pushed = gathered(weighed(spread(direction)))
        step = left / (direction * pushed).sum()
        x = x + step * direction
        residual = residual - step * pushed
        scaled = residual / steep
        left, before = (residual * scaled).sum(), left
        direction = scaled + left / before * direction
    return x


def error_of(
    weight: Tensor, basis: Sequence[Tensor], hessian: Tensor, moment: Tensor | None, factors: Tensor, size: int
) -> float:
    """tr(G E H E^T) of E = sum of factors x basis - weight; arguments as `refit_scales`."""
    members = torch.arange(weight.shape[1], device=weight.device) // size
    error = torch.stack([part[:, members] * each for part, each in zip(factors, basis, strict=True)]).sum(0) - weight
    inward = error @ hessian
    return float(((inward if moment is None else moment @ inward) * error).sum())


def _steepness(basis: Tensor, hessian: Tensor, moment: Tensor | None, members: Tensor, groups: int) -> Tensor:
    """The diagonal of the normal equations, (out, groups): b^T H b within each group, times G's diagonal."""
    inside = [members == at for at in range(groups)]
    found = torch.stack([((basis[:, own] @ hessian[own][:, own]) * basis[:, own]).sum(1) for own in inside], dim=1)
    return found if moment is None else found * moment.diagonal()[:, None]
