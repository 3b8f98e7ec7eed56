"""Codes of least tr(G E H E^T), E the matrix's error: GPTQ's feedback between columns, and between rows likewise.

Tseng et al., "Model-Preserving Adaptive Rounding", 2025 (arXiv:2505.22988). H (in, in) weighs inputs as in GPTQ, and G
(out, out) outputs: errors of two of them may cancel where the model's answers see their sum alone. Rows are taken one
by one as GPTQ takes columns: each gets the target that best makes up for the rows before it, then its columns go one by
one. An entry asks only rows before its own and columns before its own, so those of an anti-diagonal go together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trilemma.formats.grid import Format
from trilemma.techniques.quantize.gptq import Feedback, column_order, inverse_factor, nearest_code

_BLOCK = 128  # rows that go together; later ones get all their errors at once


def two_sided_codes(
    weight: Tensor,
    feedback: Feedback,
    moment: Tensor,
    scales: Tensor,
    minima: Tensor | None,
    spec: Format,
    *,
    damping: float = 0.01,
    block: int = _BLOCK,
) -> Tensor:
    """Codes (out, in) int8 for H of `feedback`, G = `moment` and given scales and minima (out, groups), in H's dtype.

    `damping` is added to G's diagonal as a share of its mean, as it was to H's; `block` changes speed only.
    """
    columns, rows = feedback.order, column_order(moment, True)
    factor = feedback.upper
    down = inverse_factor(moment, damping, rows).flip(0, 1)  # lower triangular: a row feeds those above it
    rows = rows.flip(0)
    members = columns // spec.group_size(weight.shape[1])
    scale, shift = scales[rows][:, members], None if minima is None else minima[rows][:, members]
    rest = weight.to(factor.dtype)[rows][:, columns]
    codes, nearest = torch.empty_like(rest), nearest_code(spec, rest)
    for last in range(len(rest), 0, -block):
        part = slice(max(0, last - block), last)
        own = None if shift is None else shift[part]
        errors = _block_codes(rest[part], codes[part], factor, down[part, part], scale[part], own, nearest)
        rest[: part.start].addmm_(down[part, : part.start].T, errors, alpha=-1)
    unordered = torch.empty_like(codes, dtype=torch.int8)
    unordered[rows[:, None], columns[None]] = codes.to(torch.int8)
    return unordered


def _block_codes(
    rest: Tensor,
    codes: Tensor,
    factor: Tensor,
    down: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    nearest: Callable[[Tensor], Tensor],
) -> Tensor:
    """Codes of some rows, the last row first, diagonal by diagonal; returns their scaled errors (rows, in).

    rest: targets (rows, in), of which later rows' are changed; a row's own columns are fed back in `fed` alone,
    which is read once everywhere: what is added behind that changes nothing.
    """
    count, columns = rest.shape
    above = down.tril(-1).contiguous()
    wide, high = factor.diagonal(), down.diagonal()
    fed, values = torch.zeros_like(rest), torch.empty_like(rest)
    for at in range(1 - count, columns):
        top, bottom = max(0, -at), min(count, columns - at)
        left, end = top + at, bottom + at
        target, step = rest.diagonal(at), scale.diagonal(at)
        now = target - fed.diagonal(at)
        shifted = now if shift is None else now - shift.diagonal(at)
        code = nearest(torch.where(step != 0, shifted / step, torch.zeros_like(step)))
        value = code * step if shift is None else code * step + shift.diagonal(at)
        codes.diagonal(at).copy_(code)
        values.diagonal(at).copy_(value)
        fed[top:bottom, left + 1 :].addcmul_(factor[left:end, left + 1 :], ((now - value) / wide[left:end])[:, None])
        if bottom > 1:
            error = (target - value) / high[top:bottom]
            rest[: bottom - 1, left:end].addcmul_(above[top:bottom, : bottom - 1].T, error[None], value=-1)
    return (rest - values) / high[:, None]
