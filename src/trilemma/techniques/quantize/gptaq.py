"""GPTAQ: choose codes so that the compressed layers give what the unchanged model gives, not what its weights would.

Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025 (arXiv:2504.02692). With X~
what a matrix sees behind the compressed layers and X what it saw in the unchanged model, codes are chosen for least
|Q X~ - W X|^2. That is |(Q - W') X~|^2 and a constant, with W' = W X X~^T (X~ X~^T)^-1: so W' is solved for and GPTQ
does the rest. Qronos (arXiv:2505.11695) differs from this in the first column alone. A matrix that adds to the residual
stream makes up for what that has drifted by, too.

With `guided`, output errors are weighed by what the model's answers make of them (`output_guide.py`, `two_sided.py`),
and so are those of the embedding and the head (`ends.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trilemma.core.errors import RecipeError
from trilemma.formats.grid import Format, Grid, QuantizedMatrix
from trilemma.formats.pack import pack
from trilemma.formats.quantize import find_grid
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.techniques.calibration import side_by_side
from trilemma.techniques.output_guide import guide_outputs
from trilemma.techniques.quantize.assignment import assign, named
from trilemma.techniques.quantize.ends import quantize_ends
from trilemma.techniques.quantize.gptq import Feedback, GptqSettings, damped, find_feedback, gptq_codes
from trilemma.techniques.quantize.refit import error_of, refit_scales
from trilemma.techniques.quantize.rtn import round_ends, round_matrix, scale_rule
from trilemma.techniques.quantize.two_sided import two_sided_codes
from trilemma.techniques.technique import Build
from trilemma.techniques.two_paths import Pair, calibrate_beside
from trilemma.techniques.walk_folder import made_once

_COLUMNS = 1024  # of a matrix of statistics that are copied at a time


class GptaqSettings(GptqSettings):
    """Settings of `gptaq`."""

    pull: float = Field(1.0, ge=0, le=1, description="how far outputs are pulled to the unchanged model's; 0 as gptq")
    drift: float = Field(
        1.0, ge=0, le=1, description="share of the residual stream's drift that the matrices adding to it make up for"
    )
    refits: int = Field(
        0, ge=0, le=8, description="times that scales are fitted to the codes, and codes chosen again before the next"
    )
    guided: bool = Field(
        False, description="weigh output errors by the gradients of the model's answers: lower KL, a backward pass"
    )
    rows: int = Field(1024, ge=1, description="most outputs whose errors may cancel each other, where guided")


class Gptaq:
    """Quantize stage by stage towards the outputs of the unchanged model."""

    name: ClassVar[str] = "gptaq"
    what: ClassVar[str] = "choose codes as gptq, to give what the unchanged model gives behind the compressed layers"
    Settings: ClassVar[type[GptaqSettings]] = GptaqSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: GptaqSettings) -> bool:
        return True

    def apply(self, model: Model, settings: GptaqSettings, build: Build) -> Model:
        formats, runs = assign(model, settings, build)
        guide = None
        if settings.guided:
            guide = build.once(f"guide {settings.rows}", model, lambda: guide_outputs(model, build, settings.rows))
        moments: Mapping[str, Tensor] = {} if guide is None else guide.moments

        def ends() -> Mapping[str, StoredMatrix]:
            if guide is None:
                return round_ends(model, formats, build)
            return quantize_ends(model, formats, build, guide.vocabulary, settings)

        rounded = made_once(model, build, "ends", ends).with_tensors({}, runs)

        def choose(found: tuple[str, Pair, Tensor | None]) -> StoredMatrix:
            name, pair, missing = found
            return _choose(name, model.tensor(name), pair, missing, moments.get(name), formats[name], settings)

        def lack(found: tuple[str, Pair]) -> Tensor | None:
            name, pair = found
            if formats[name].floating:
                return None
            return missing_outputs(torch.from_numpy(model.tensor(name)), pair, settings.pull, settings.drift)

        def quantized(pairs: Mapping[str, Pair]) -> dict[str, Float32 | StoredMatrix]:
            missing = side_by_side(lack, pairs.items(), build.threads)
            for pair in pairs.values():
                pair.forget_paths()
            codes = side_by_side(choose, zip(pairs, pairs.values(), missing, strict=True), build.threads)
            return dict(zip(pairs, codes, strict=True))

        return calibrate_beside(rounded, model, build, runs, quantized)


def _choose(
    name: str,
    weight: Float32,
    pair: Pair,
    missing: Tensor | None,
    moments: Tensor | None,
    spec: Format,
    settings: GptaqSettings,
) -> StoredMatrix:
    if missing is None or not pair.tokens:  # an expert that no calibration token chose is rounded to nearest
        return round_matrix(name, weight, spec, settings.scale)
    try:
        return pack(quantize_gptaq(weight, missing, pair.matrix, moments, spec, settings))
    except RecipeError as error:
        raise named(name, error) from None


def missing_outputs(weight: Tensor, pair: Pair, pull: float, drift: float) -> Tensor:
    """(pull (W X - W X~) + drift (R - R~)) X~^T (out, in): what the outputs that are wanted have beyond those of W."""
    weight = weight.to(pair.matrix)
    columns = [slice(first, first + _COLUMNS) for first in range(0, weight.shape[1], _COLUMNS)]
    missing = torch.cat([weight @ (pair.cross[:, part] - pair.matrix[:, part]) for part in columns], 1)
    missing *= pull
    return missing if pair.drift is None else missing.add_(pair.drift, alpha=drift)


def quantize_gptaq(
    weight: Float32,
    missing: Tensor | None,
    hessian: Tensor,
    moments: Tensor | None,
    spec: Format,
    settings: GptaqSettings,
) -> QuantizedMatrix:
    """One matrix (out, in) on its grid: codes, then scales for them, `refits` times over.

    missing: as `missing_outputs`, or None where the weight itself is wanted;
    moments: blocks of E[g g^T] along the outputs, as `output_moments` gives them, or None where all outputs are equal.

    Raises:
        RecipeError: as `quantize_gptq`.
    """
    importance = hessian.diagonal().to("cpu", torch.float32).numpy()
    feedback = find_feedback(hessian, settings)
    target = torch.from_numpy(weight).to(hessian)
    if missing is not None:
        target = target + feedback.solve(missing)  # of least error, damped towards the weight
    grid = find_grid(target.cpu().numpy(), spec, scale=scale_rule(spec, settings.scale), importance=importance)
    factors, units = (torch.from_numpy(each).to(hessian) for each in _levels(grid))
    found = [
        _solve(target[rows], hessian, feedback, moment, factors[:, rows], units[:, rows], spec, settings)
        for rows, moment in output_blocks(len(target), moments)
    ]
    codes = torch.cat([codes for codes, _ in found]).cpu().numpy()
    fitted = torch.cat([factors for _, factors in found], dim=1).cpu().numpy().astype(np.float16)
    fitted_grid = replace(grid, scales=fitted[0], minima=None if grid.minima is None else fitted[1])
    return fitted_grid.with_codes(codes)


def _levels(grid: Grid) -> tuple[Float32, Float32]:
    """Scales and minima (1 or 2, out, f16 groups), and what each group has of them (1 or 2, out, groups)."""
    both = [(grid.scales, grid.sub_scales)]
    if grid.minima is not None:
        both.append((grid.minima, grid.sub_minima))
    units = [np.ones_like(scales) if part is None else part for scales, part in both]
    return np.stack([scales for scales, _ in both]).astype(np.float32), np.stack(units).astype(np.float32)


def output_blocks(rows: int, moments: Tensor | None) -> list[tuple[slice, Tensor | None]]:
    """Rows whose errors may cancel each other, and their moment: all of them and none where nothing guides."""
    if moments is None:
        return [(slice(0, rows), None)]
    size = moments.shape[1]
    found: list[tuple[slice, Tensor | None]] = []
    for at, moment in enumerate(moments):
        held = min(size, rows - at * size)
        found.append((slice(at * size, at * size + held), moment[:held, :held]))
    return found


def _solve(
    target: Tensor,
    hessian: Tensor,
    feedback: Feedback,
    moment: Tensor | None,
    factors: Tensor,
    units: Tensor,
    spec: Format,
    settings: GptaqSettings,
) -> tuple[Tensor, Tensor]:
    """Codes (rows, in) and factors (scales and perhaps minima, rows, f16 groups) in f16: the best that were seen."""
    size = spec.group_size(target.shape[1])
    members = torch.arange(target.shape[1], device=target.device) // size
    per = 1 if spec.supergroup is None else spec.supergroup // size

    def chosen(factors: Tensor) -> Tensor:
        steps = factors.repeat_interleave(per, 2)[..., : units.shape[2]] * units
        return _codes(target, feedback, moment, steps, spec, settings)

    codes = chosen(factors)
    if not settings.refits:
        return codes, factors
    heavy = damped(hessian, settings.damping)
    weights = None if moment is None else damped(moment.to(hessian), settings.damping)
    seen = []
    for again in range(settings.refits):
        if again:
            codes = chosen(factors)
        basis = [codes.to(hessian) * units[0][:, members], *(part[:, members] for part in units[1:])]
        fitted = refit_scales(target, basis, heavy, weights, factors, size * per).half().to(hessian)
        lost = ~torch.isfinite(fitted).all(0) | (fitted[0] == 0)
        factors = torch.where(lost, factors, fitted)
        seen.append((error_of(target, basis, heavy, weights, factors, size * per), codes, factors))
    _, codes, factors = min(seen, key=lambda each: each[0])
    return codes, factors


def _codes(
    target: Tensor, feedback: Feedback, moment: Tensor | None, steps: Tensor, spec: Format, settings: GptaqSettings
) -> Tensor:
    """steps: scales and perhaps minima (1 or 2, rows, groups)."""
    scale, shift = steps[0], None if spec.symmetric else steps[1]
    if moment is None:
        return gptq_codes(target, feedback, scale, shift, spec, block=settings.block)
    return two_sided_codes(target, feedback, moment.to(feedback.upper), scale, shift, spec, damping=settings.damping)
