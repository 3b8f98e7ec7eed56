"""GPTQ: choose codes column by column, letting later columns make up for the error of earlier ones.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022 (arXiv:2210.17323). Groups are static: scales are fitted to the original weights, weighted by
the Hessian's diagonal and rounded to f16, before any code is chosen. So the order of columns is
free, and no group ever sees half of its columns updated. Embedding and head are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trilemma.core.errors import RecipeError
from trilemma.formats.grid import Format, QuantizedMatrix
from trilemma.formats.pack import pack
from trilemma.formats.quantize import code_borders, find_grid, usable_codes
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.techniques.calibration import Gram, calibrate_layers, side_by_side
from trilemma.techniques.quantize.assignment import WeightSettings, assign, named
from trilemma.techniques.quantize.rtn import ScaleChoice, round_ends, round_matrix, scale_rule
from trilemma.techniques.technique import Build
from trilemma.techniques.walk_folder import made_once

_DAMPING_STEPS = 6
_LEAF = 128  # rows that LAPACK inverts


class GptqSettings(WeightSettings):
    """Settings of `gptq`."""

    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")
    block: int = Field(128, ge=1, description="columns between two updates of all later columns; changes speed only")
    activation_order: bool = Field(True, description="take columns by falling activation energy")
    scale: ScaleChoice = Field("mse", description="how scales are found: mse, absmax or auto (mse below 8 bits)")


class Gptq:
    """Quantize layer by layer with error feedback."""

    name: ClassVar[str] = "gptq"
    what: ClassVar[str] = "choose codes with second-order error feedback on calibration text"
    Settings: ClassVar[type[GptqSettings]] = GptqSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: GptqSettings) -> bool:
        return True

    def apply(self, model: Model, settings: GptqSettings, build: Build) -> Model:
        formats, runs = assign(model, settings, build)
        before = model
        model = made_once(model, build, "ends", lambda: round_ends(before, formats, build)).with_tensors({}, runs)

        def choose(found: tuple[str, Gram]) -> StoredMatrix:
            name, gram = found
            return _choose(name, before.tensor(name), gram, formats[name], settings)

        def replace(grams: Mapping[str, Gram]) -> dict[str, Float32 | StoredMatrix]:
            # Columns are too short to be shared by threads: matrices go side by side instead, those of long rows first.
            found = sorted(grams.items(), key=lambda each: -len(each[1].matrix))
            codes = side_by_side(choose, found, build.threads)
            return {name: matrix for (name, _), matrix in zip(found, codes, strict=True)}

        return calibrate_layers(model, build, runs, replace)


def _choose(name: str, weight: Float32, gram: Gram, spec: Format, settings: GptqSettings) -> StoredMatrix:
    if spec.floating or not gram.tokens:  # an expert that no calibration token chose is rounded to nearest
        return round_matrix(name, weight, spec, settings.scale)
    try:
        return pack(quantize_gptq(weight, gram.matrix, spec, settings))
    except RecipeError as error:
        raise named(name, error) from None


def quantize_gptq(weight: Float32, hessian: Tensor, spec: Format, settings: GptqSettings) -> QuantizedMatrix:
    """One matrix (out, in) on its grid, for inputs whose H = X^T X is `hessian` (in, in), in any scale.

    Raises:
        RecipeError: values that the format can not hold, or a Hessian that no damping makes positive.
    """
    importance = hessian.diagonal().to("cpu", torch.float32).numpy()
    grid = find_grid(weight, spec, scale=scale_rule(spec, settings.scale), importance=importance)
    offsets = grid.offsets()
    codes = gptq_codes(
        torch.from_numpy(weight), find_feedback(hessian, settings), torch.from_numpy(grid.steps()),
        None if offsets is None else torch.from_numpy(offsets), spec, block=settings.block,
    )  # fmt: skip
    return grid.with_codes(codes.numpy())


@dataclass(frozen=True)
class Feedback:
    """What is left of a Hessian (in, in) once columns have their turns: that order, and U of `inverse_factor` in it."""

    order: Tensor
    upper: Tensor

    @classmethod
    def of(cls, hessian: Tensor, damping: float = 0.01, *, activation_order: bool = True) -> Feedback:
        """Raises RecipeError as `inverse_factor`."""
        order = column_order(hessian, activation_order)
        return cls(order, inverse_factor(hessian, damping, order))

    def solve(self, values: Tensor) -> Tensor:
        """values (rows, in) times the inverse of the damped Hessian."""
        found = torch.empty_like(values)
        found[:, self.order] = values[:, self.order] @ self.upper.T @ self.upper
        return found


def find_feedback(hessian: Tensor, settings: GptqSettings) -> Feedback:
    return Feedback.of(hessian, settings.damping, activation_order=settings.activation_order)


def gptq_codes(
    weight: Tensor,
    feedback: Feedback,
    scales: Tensor,
    minima: Tensor | None,
    spec: Format,
    *,
    block: int = 128,
    directions: Tensor | None = None,
) -> Tensor:
    """Codes (out, in) int8 for given scales and minima (out, groups), all in the feedback's dtype.

    Within a block errors go to the block's later columns at once; columns behind the block get the
    whole block's error in one product when it is done, and only then. Inputs that calibration never
    saw are rounded to nearest.

    directions: (out, in); where given, a row's own Hessian is H + m m^T with its m of these.
    """
    order, upper = feedback.order, feedback.upper
    dtype, device = upper.dtype, upper.device
    group = order // spec.group_size(weight.shape[1])
    scale = scales.to(device, dtype).T.contiguous()  # (groups, out)
    shift = None if minima is None else minima.to(device, dtype).T.contiguous()
    rest = weight.to(device, dtype).T[order].contiguous()  # (in, out): a column of the matrix is a row here
    codes = torch.empty(rest.shape, dtype=torch.int8, device=device)
    own = None if directions is None else _OwnDirections(directions.to(device, dtype)[:, order], upper)
    for first in range(0, len(rest), block):
        last = min(first + block, len(rest))
        errors = _block_codes(rest, codes, upper, scale, shift, group, spec, own, first, last)
        if last < len(rest):
            rest[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return unordered.T.contiguous().cpu()


def _block_codes(
    rest: Tensor,
    codes: Tensor,
    upper: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    group: Tensor,
    spec: Format,
    own: _OwnDirections | None,
    first: int,
    last: int,
) -> Tensor:
    """Codes of the columns first..last; returns their scaled errors (columns, out)."""
    nearest = nearest_code(spec, rest)
    errors = torch.empty(last - first, rest.shape[1], dtype=rest.dtype, device=rest.device)
    for column, at in zip(range(first, last), group[first:last].tolist(), strict=True):
        values, step = rest[column], scale[at]
        wanted = values if own is None else values + own.pull(column) * upper[column, column]
        shifted = wanted if shift is None else wanted - shift[at]
        code = nearest(torch.where(step != 0, shifted / step, torch.zeros_like(step)))
        codes[column] = code.to(torch.int8)
        rounded = code * step if shift is None else code * step + shift[at]
        error = (values - rounded) / upper[column, column]
        errors[column - first] = error
        if own is not None:
            own.add(column, error)
        if column + 1 < last:
            rest[column + 1 : last].addr_(upper[column, column + 1 : last], error, alpha=-1)
    return errors


class _OwnDirections:
    """What a direction m of each row adds to its targets, where its Hessian is H + m m^T.

    With U of `inverse_factor` and the feedback of H alone, the error of a row along its m is that of the columns done.
    To take it back over the columns left (Sherman and Morrison), each moves by U_jj (U m)_j over 1 + sum (U m)^2 of
    those left. U m is the same for all columns, so a row needs one product and one running number.
    """

    def __init__(self, directions: Tensor, upper: Tensor) -> None:
        self.along = upper @ directions.T  # (in, out)
        self.left = 1 + self.along.square().flip(0).cumsum(0).flip(0)
        self.error = torch.zeros_like(self.along[0])  # m^T (W - Q), as it would end with the feedback of H alone

    def pull(self, column: int) -> Tensor:
        return self.along[column] * self.error / self.left[column]

    def add(self, column: int, error: Tensor) -> None:
        self.error += error * self.along[column]


def nearest_code(spec: Format, like: Tensor) -> Callable[[Tensor], Tensor]:
    """The function that rounds values in place of codes, of the dtype and device of `like`, to the nearest code."""
    if spec.values is None:
        low, high = usable_codes(spec)
        return lambda scaled: scaled.round_().clamp_(low, high)
    codes = torch.tensor(spec.values, dtype=like.dtype, device=like.device)
    borders = torch.from_numpy(code_borders(spec)).to(like)
    return lambda scaled: codes[torch.bucketize(scaled, borders)]


def column_order(hessian: Tensor, activation_order: bool) -> Tensor:
    """Columns by falling activation energy (ties by index), or as they are."""
    if not activation_order:
        return torch.arange(hessian.shape[0], device=hessian.device)
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """Upper triangular U with U^T U = (H + damping mean(diag H) I)^-1, in the Hessian's dtype.

    Falls back to f64, then to ever more damping. Beside H, one matrix of its size is held.

    Args:
        order: takes rows and columns of H in this order.

    Raises:
        RecipeError: no damping up to 10^5 times the given one is enough.
    """
    for dtype in (hessian.dtype, torch.float64):
        for step in range(1 if dtype != torch.float64 else _DAMPING_STEPS):
            made = damped(hessian, damping * 10**step, order).to(dtype)
            if _invert_factor(made) and torch.isfinite(made).all():
                return made.to(hessian.dtype)
    raise RecipeError("The calibration statistics can not be inverted. Use other calibration text or more of it.")


def damped(hessian: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """H + damping mean(diag H) I, new; an input never seen has the mean there, so no error is passed on from it."""
    diagonal = hessian.diagonal() if order is None else hessian.diagonal()[order]
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else torch.ones((), dtype=hessian.dtype, device=hessian.device)
    made = hessian.clone() if order is None else hessian[order[:, None], order]
    made.diagonal()[~alive] = mean
    made.diagonal().add_(mean * damping)
    return made


def _invert_factor(h: Tensor) -> bool:
    """Put U, upper triangular with U^T U = h^-1, in the place of h; False where h is not positive.

    h = R R^T with R upper triangular, and U = R^-1: of [[a, b], [b^T, c]] first c's, then that of
    a - (b U_c^T)(b U_c^T)^T.
    """
    if len(h) <= _LEAF:
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not failed:
            eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
            h.copy_(torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1))
        return not failed
    half = len(h) // 2
    a, b, c = h[:half, :half], h[:half, half:], h[half:, half:]
    if not _invert_factor(c):
        return False
    outer = b @ c.T
    a.addmm_(outer, outer.T, alpha=-1)
    if not _invert_factor(a):
        return False
    torch.mm(a, outer @ c, out=b).neg_()
    h[half:, :half] = 0
    return True
