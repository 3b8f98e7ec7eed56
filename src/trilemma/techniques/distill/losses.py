"""How far a student's next-token distribution is from its teacher's, over the whole vocabulary, a few rows at a time.

Logits of a long batch over a large vocabulary are the largest tensor of all, so they are never held whole:
`chunked_loss` makes some rows of logits, their loss and their gradients, and lets go of them.

Left out: losses between hidden states (logits alone suffice for healing: Muralidharan et al. 2024,
arXiv 2407.14679), temperatures other than 1, and samples drawn from the student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

Divergence = Literal["forward", "reverse", "skewed"]
RowLoss = Callable[[slice, Tensor], Tensor]
"""(which rows, their logits (rows, vocab) in f32) -> the sum of their losses, a scalar."""

CHUNK_ROWS = 256
SKEW = 0.1  # of the teacher in the mixture of the skewed divergence (Ko et al. 2024, arXiv 2402.03898)


class TeacherRows(Protocol):
    """What the teacher says about the positions of one batch, position after position."""

    def divergence(self, rows: slice, log_q: Tensor, kind: Divergence) -> Tensor:
        """(rows,) nats; `log_q` (rows, vocab) are the student's log-probabilities of the same positions."""
        ...


class WholeRows(TeacherRows, Protocol):
    """The same, where the whole distribution is known."""

    def log_probs(self, rows: slice) -> Tensor:
        """(rows, vocab) f32, without gradients."""
        ...


def divergence(log_p: Tensor, log_q: Tensor, kind: Divergence = "forward") -> Tensor:
    """Divergence of each row in nats.

    Args:
        log_p: (..., classes) f32 log-probabilities of the teacher.
        log_q: the same of the student; gradients flow through it.
        kind: 'forward' KL(p || q), 'reverse' KL(q || p), 'skewed' KL(p || 0.1 p + 0.9 q).

    Returns:
        (...,) f32, not below zero but for rounding.
    """
    if kind == "reverse":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    p = log_p.exp()
    if kind == "skewed":
        log_q = (SKEW * p + (1 - SKEW) * log_q.exp()).clamp_min(torch.finfo(log_q.dtype).tiny).log()
    found: Tensor = (torch.special.xlogy(p, p) - p * log_q).sum(-1)
    return found


def with_tail(log_probs: Tensor) -> Tensor:
    """(..., k) log-probabilities of some classes -> (..., k + 1), the last one is all the rest together."""
    known = log_probs.logsumexp(-1, keepdim=True).clamp_max(-1e-7)  # the rest is never quite zero
    return torch.cat((log_probs, torch.log(-torch.expm1(known))), dim=-1)


@dataclass(frozen=True)
class FullRows:
    """The teacher's whole distribution, made from its hidden states when it is asked for.

    hidden (rows, dim) after the final norm; head (vocab, dim).
    """

    hidden: Tensor
    head: Tensor

    def log_probs(self, rows: slice) -> Tensor:
        with torch.no_grad():
            return functional.linear(self.hidden[rows], self.head).float().log_softmax(-1)

    def divergence(self, rows: slice, log_q: Tensor, kind: Divergence) -> Tensor:
        return divergence(self.log_probs(rows), log_q, kind)


@dataclass(frozen=True)
class LogitRows:
    """The teacher's logits, (rows, vocab), as another program made them."""

    logits: Tensor

    def log_probs(self, rows: slice) -> Tensor:
        return self.logits[rows].float().log_softmax(-1)

    def divergence(self, rows: slice, log_q: Tensor, kind: Divergence) -> Tensor:
        return divergence(self.log_probs(rows), log_q, kind)


@dataclass(frozen=True)
class TopRows:
    """The teacher's k most likely tokens, ids and log-probabilities `top`, both (rows, k); the rest is one class.

    The divergence of these k + 1 classes is at most the whole one: what is missing is the teacher's mass of the
    rest times the divergence inside the rest.
    """

    ids: Tensor
    top: Tensor

    def divergence(self, rows: slice, log_q: Tensor, kind: Divergence) -> Tensor:
        student = with_tail(log_q.gather(-1, self.ids[rows]))
        return divergence(with_tail(self.top[rows].float()), student, kind)


def mixed_loss(teacher: TeacherRows | None, targets: Tensor, weight: float, kind: Divergence) -> RowLoss:
    """weight x divergence from the teacher + (1 - weight) x cross-entropy of the text's own next tokens.

    Args:
        teacher: may be None when weight is 0.
        targets: (rows,) int64, the text's next tokens.
    """

    def loss(rows: slice, logits: Tensor) -> Tensor:
        log_q = logits.log_softmax(-1)
        total = logits.new_zeros(())
        if teacher is not None and weight:
            total = total + weight * teacher.divergence(rows, log_q, kind).sum()
        if weight < 1:
            total = total + (1 - weight) * functional.nll_loss(log_q, targets[rows], reduction="sum")
        return total

    return loss


def chunked_loss(hidden: Tensor, head: Tensor, loss: RowLoss, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """The mean over rows of `loss` on logits = hidden @ head.T, with no more than `chunk_rows` rows of logits at once.

    Gradients with respect to hidden and head are made chunk by chunk on the way forward, so nothing is
    computed twice (the form of the fused losses of Hsu et al. 2024, arXiv 2410.10989).

    Args:
        hidden: (rows, dim) after the final norm.
        head: (vocab, dim).
    """
    return _Chunked.apply(hidden, head, loss, chunk_rows)  # type: ignore[no-any-return, no-untyped-call]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, loss: RowLoss, chunk_rows: int) -> Tensor:
        wanted, head_wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_head = torch.zeros_like(head) if head_wanted else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        narrow = head.to(functional.linear(hidden[:1], head[:1]).dtype)  # what autocast computes in
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            raw = functional.linear(hidden[rows], narrow)
            with torch.set_grad_enabled(wanted or head_wanted):
                logits = raw.float().requires_grad_(wanted or head_wanted)
                part = loss(rows, logits)
            total += part.detach()
            if not (wanted or head_wanted):
                continue
            (grad,) = torch.autograd.grad(part, logits)
            grad = grad.to(raw.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ narrow
            if grad_head is not None:
                grad_head += grad.T @ hidden[rows].to(raw.dtype)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.rows = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0] / ctx.rows
        return (
            None if grad_hidden is None else grad_hidden * scale,
            None if grad_head is None else grad_head * scale,
            None,
            None,
        )
