"""Which optimizer has which parameters, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from trilemma.core.errors import TrainingError
from trilemma.techniques.training.muon import Muon
from trilemma.techniques.training.settings import TrainingSettings


def learning_rate_at(settings: TrainingSettings, step: int) -> float:
    """The learning rate of step `step`, counted from 0."""
    warmup = settings.warmup_fraction * settings.steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / (math.floor(warmup) + 1)
    low = settings.final_fraction
    if settings.schedule == "cosine":
        done = (step - warmup) / max(1.0, settings.steps - warmup)
        return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
    if settings.schedule == "wsd":
        left = (settings.steps - step) / max(1.0, settings.decay_fraction * settings.steps)
        return settings.learning_rate * (low + (1 - low) * min(1.0, left))
    return settings.learning_rate


def make_optimizers(module: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Optimizers over what requires gradients; weight decay on matrices only.

    Raises:
        TrainingError: nothing requires gradients.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trained:
        raise TrainingError("No parameter of the module requires gradients: there is nothing to train.")
    muon = [p for name, p in trained.items() if settings.optimizer == "muon" and _is_inner_matrix(name, p)]
    taken = {id(parameter) for parameter in muon}
    rest = [parameter for parameter in trained.values() if id(parameter) not in taken]
    decayed, plain = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(
            Muon(muon, settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay)
        )
    if settings.optimizer == "sign":
        return [SignDescent(rest, settings.learning_rate)]
    groups = [(decayed, settings.weight_decay), (plain, 0.0)]
    listed = [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]
    if listed:
        optimizers.append(torch.optim.AdamW(listed, settings.learning_rate, betas=(settings.beta1, settings.beta2)))
    return optimizers


class SignDescent(torch.optim.Optimizer):
    """Steps of one length for every parameter, against the sign of its gradient; no state, no weight decay."""

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float) -> None:
        super().__init__(parameters, {"lr": learning_rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


def _is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Not an embedding or head: their rows are tokens, each with its own rate of being seen."""
    return parameter.ndim == 2 and not any("embed" in part or "head" in part for part in name.split("."))
