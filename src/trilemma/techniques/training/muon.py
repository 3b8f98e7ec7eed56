"""The Muon optimizer: momentum whose update is made orthogonal, for the matrices inside layers.

Newton-Schulz pushes every singular value of the momentum towards 1, so that rare directions learn
as fast as common ones (Jordan et al. 2024, "Muon: an optimizer for hidden layers"). The update is
scaled so that its entries have the root mean square of a typical AdamW step (Liu et al. 2025,
arXiv 2502.16982): one learning rate and one weight decay then serve both optimizers.
Embeddings, heads, norms and biases are left to AdamW; `optimizers.py` makes the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic of Jordan et al.: steep at 0 and flat around 1. It lands in about [0.68, 1.14], not on 1 exactly.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADAMW_RMS = 0.2


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Roughly the polar factor U Vᵀ of `matrix` = U S Vᵀ.

    Args:
        matrix: (out, in), any floating dtype; computed in f32 on the CPU and in bf16 on a GPU.
        steps: Newton-Schulz iterations.

    Returns:
        (out, in) in the dtype of `matrix`, the same singular vectors, singular values near 1.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)  # no singular value above 1, where the quintic would diverge
    for _ in range(steps):
        gram = x @ x.T  # (short side, short side)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = x.T if tall else x
    return result.to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, with decoupled weight decay. All parameters must be matrices."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices only, not a tensor of shape {tuple(parameter.shape)}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon.step takes no closure.")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalize(torch.lerp(gradient, momentum, group["momentum"]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * ADAMW_RMS * max(parameter.shape) ** 0.5)
