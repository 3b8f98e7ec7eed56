"""AWQ: give the channels that matter finer steps of the grid, before weights are quantized; changes no result.

Lin et al., "AWQ: Activation-aware Weight Quantization", 2023 (arXiv:2306.00978). Columns of a matrix are multiplied by
s and their inputs divided by it, where `folding.py` says that this is possible. Scales are |x|^a / |w|^(1 - a) or |x|^a
(`duo`), and a is searched for each place: the least squared output error on a sample of calibration inputs, after
weights and inputs are rounded as the step that follows will have them rounded. So its settings are those of that step:
`awq+W4A8-g32` copies them. `clip` then narrows each group's range where that lowers the output error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from trilemma.formats.grid import Format
from trilemma.formats.quantize import quantize_rtn
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Float32, Model
from trilemma.runtime.reference import rounding_for
from trilemma.techniques.calibration import Gram, side_by_side, walk_layers
from trilemma.techniques.quantize.assignment import WeightSettings, assign_formats
from trilemma.techniques.quantize.folding import Fold, Folded, folds
from trilemma.techniques.quantize.rtn import ScaleChoice, scale_rule
from trilemma.techniques.stored import refuse_packed
from trilemma.techniques.technique import Build

_CLIPS = 11
_LEAST = 1e-4  # of a mean activation, so that a dead channel has a scale


class AwqSettings(WeightSettings):
    """Settings of `awq`; those of formats say how the step that follows will quantize."""

    rows: int = Field(512, ge=1, description="about so many inputs of each matrix, out of those windows")
    scale: ScaleChoice = Field("auto", description="how scales of groups are found while searching")
    grid: int = Field(20, ge=1, description="values of a between 0 and 1 that are tried")
    duo: bool = Field(False, description="divide by the weights' size to the power 1 - a too")
    windows: int = Field(16, ge=1, description="calibration windows that are looked at, spread over all")
    clip: bool = Field(False, description="narrow the range of groups where that lowers the output error")


class Awq:
    """Scale channels before they are rounded."""

    name: ClassVar[str] = "awq"
    what: ClassVar[str] = "scale channels by activation so that those that matter round finer; before quantization"
    Settings: ClassVar[type[AwqSettings]] = AwqSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: AwqSettings) -> bool:
        return True

    def config_after(self, config: DecoderConfig, settings: AwqSettings) -> DecoderConfig:
        """The same shapes."""
        return config

    def exact(self, settings: AwqSettings) -> bool:
        return True

    def apply(self, model: Model, settings: AwqSettings, build: Build) -> Model:
        """Raises RecipeError where matrices are packed already: scales come before quantization."""
        refuse_packed(model, self.name, "awq+W4A8-g32")
        formats = assign_formats(model.config, settings)

        def change(model: Model, index: int, grams: Mapping[str, Gram]) -> Model:
            return model.with_tensors(_prepared(model, index, grams, formats, settings, build.threads))

        few = _with_fewer(build, settings.windows)
        return walk_layers(model, few, [change], sample=settings.rows, what="searching scales")


def _prepared(
    model: Model,
    index: int,
    grams: Mapping[str, Gram],
    formats: Mapping[str, Format],
    settings: AwqSettings,
    threads: int | None,
) -> Mapping[str, Float32]:
    """New tensors of one layer."""
    folded = Folded(model)
    places = list(folds(model.config, index))

    def search(place: Fold) -> Float32:
        return best_scales(place, folded, grams, formats, settings)

    # What one place scales are rows of another's matrices, and a row's scale changes none of its codes.
    found = dict(zip(places, side_by_side(search, places, threads), strict=True))
    for place, scales in found.items():
        folded.fold(place, scales)
    if settings.clip:
        readers = [(place, name) for place in places for name in place.readers if _is_rounded(name, grams, formats)]

        def narrow(reader: tuple[Fold, str]) -> Float32:
            place, name = reader
            columns = place.of_columns(found[place])
            hessian: Float32 = (grams[name].hessian().cpu().numpy() / np.outer(columns, columns)).astype(np.float32)
            return clipped(folded.get(name), hessian, formats[name], settings.scale)

        for (_, name), values in zip(readers, side_by_side(narrow, readers, threads), strict=True):
            folded.values[name] = values
    return folded.values


def _with_fewer(build: Build, windows: int) -> Build:
    if build.calibration is None or len(build.calibration) <= windows:
        return build
    chosen = np.linspace(0, len(build.calibration) - 1, windows).astype(np.intp)
    return replace(build, calibration=build.calibration[chosen])


def best_scales(
    place: Fold, folded: Folded, grams: Mapping[str, Gram], formats: Mapping[str, Format], settings: AwqSettings
) -> Float32:
    """Scales (channels,) of the least output error of the place's readers; ones where nothing is rounded or seen."""
    weights = {name: folded.get(name) for name in place.readers if _is_rounded(name, grams, formats)}
    columns = folded.get(place.readers[0]).shape[1]
    best: Float32 = np.ones_like(place.of_channels(np.ones(columns, np.float32)))
    if not weights:
        return best
    x = grams[next(iter(weights))].rows  # (rows, in), the same for all
    active = place.of_channels(x.abs().mean(0).cpu().numpy(), "mean")
    heavy = place.of_channels(np.concatenate([_shares(weight) for weight in weights.values()]).mean(axis=0), "mean")
    least = output_error(x, weights, best, place, formats, settings)
    for step in range(1, settings.grid + 1):
        scales = channel_scales(active, heavy if settings.duo else None, step / settings.grid)
        error = output_error(x, weights, scales, place, formats, settings)
        if error < least:
            best, least = scales, error
    return best


def _is_rounded(name: str, grams: Mapping[str, Gram], formats: Mapping[str, Format]) -> bool:
    return not formats[name].floating and name in grams and grams[name].tokens > 0


def _shares(weight: Float32) -> Float32:
    """|w| as a share of the largest of its row."""
    size = np.abs(weight)
    shares: Float32 = size / np.maximum(size.max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return shares


def channel_scales(active: Float32, heavy: Float32 | None, exponent: float) -> Float32:
    """active^a / heavy^(1 - a), or active^a alone, around 1 in the middle of their range (geometric).

    Args:
        active: (channels,) mean |x|. heavy: (channels,) mean |w| of what reads it, or None.
    """
    scales = np.maximum(active, _LEAST * active.max() + 1e-30).astype(np.float64) ** exponent
    if heavy is not None:
        scales /= np.maximum(heavy, _LEAST * heavy.max() + 1e-30) ** (1 - exponent)
    centred: Float32 = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
    return centred


def output_error(
    x: Tensor,
    weights: Mapping[str, Float32],
    scales: Float32,
    place: Fold,
    formats: Mapping[str, Format],
    settings: AwqSettings,
) -> float:
    """Summed squared error of x W^T over matrices, with columns scaled and rounded and inputs treated alike."""
    columns = place.of_columns(scales)
    inputs = x / torch.from_numpy(columns).to(x.device)
    total = 0.0
    for name, weight in weights.items():
        spec = formats[name]
        rounded = quantize_rtn(weight * columns, spec, scale=scale_rule(spec, settings.scale)).dequantize()
        wanted = functional.linear(x, torch.from_numpy(weight).to(x.device))
        seen = rounding_for(spec, settings.activations)(inputs)
        found = functional.linear(seen, torch.from_numpy(rounded).to(x.device))
        total += float((found - wanted).square().sum(dtype=torch.float64))
    return total


def clipped(weight: Float32, hessian: Float32, spec: Format, scale: ScaleChoice) -> Float32:
    """Weights (out, in) with each group's range narrowed to what gives least output error of the group alone."""
    columns = weight.shape[1]
    size, groups = spec.group_size(columns), spec.groups(columns)
    missing = size * groups - columns
    full = np.pad(hessian, ((0, missing), (0, missing))).reshape(groups, size, groups, size)
    energy = full[np.arange(groups), :, np.arange(groups)]  # (groups, group, group)
    largest = np.abs(_in_groups(weight, size, groups)).max(axis=2)
    best, least = weight, np.full((len(weight), groups), np.inf, np.float32)
    for share in np.linspace(1.0, 0.5, _CLIPS, dtype=np.float32):
        bound = np.repeat(largest * share, size, axis=1)[:, :columns]
        narrow = np.clip(weight, -bound, bound)
        rounded = quantize_rtn(narrow, spec, scale=scale_rule(spec, scale)).dequantize()
        off = _in_groups(rounded - weight, size, groups)
        error = np.einsum("ogi,ogi->og", np.einsum("ogi,gij->ogj", off, energy, optimize=True), off)
        better = error < least
        least = np.where(better, error, least)
        best = np.where(np.repeat(better, size, axis=1)[:, :columns], narrow, best)
    return best


def _in_groups(values: Float32, size: int, groups: int) -> Float32:
    rows, columns = values.shape
    grouped: Float32 = np.pad(values, ((0, 0), (0, size * groups - columns))).reshape(rows, groups, size)
    return grouped
