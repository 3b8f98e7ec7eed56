"""Structured pruning: FFN channels and attention heads go, what stays makes up for them, everything gets faster.

Two walks over the calibration text. The first, through the model as it is, gives each part's error curve:
what removing ever more of it costs in output error with the others updated. The curves decide how much each
part loses. The second, through the pruned predecessors, chooses anew what goes, cuts, and updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trilemma.model.config import DecoderConfig
from trilemma.model.model import Model
from trilemma.techniques.calibration import Change, Gram, walk_layers
from trilemma.techniques.prune.compensate import (
    Elimination,
    bias_shift,
    eliminate,
    least_squares,
    mean_gram,
)
from trilemma.techniques.prune.cut import cut_channels, cut_heads, head_columns
from trilemma.techniques.prune.widths import (
    HeadUnit,
    Parts,
    Slot,
    find_slots,
    shrink,
    spread_by_error,
    spread_evenly,
)
from trilemma.techniques.stored import refuse_packed
from trilemma.techniques.technique import Build, TechniqueSettings

Compensation = Literal["affine", "least-squares", "bias", "none"]


class WidthSettings(TechniqueSettings):
    """Settings of `prune-width`."""

    share: float = Field(0.25, gt=0, lt=1, description="share of the weights of these parts that goes")
    parts: Parts = Field(
        "both", description="ffn: channels of dense FFNs; heads: attention heads; both: whichever costs less"
    )
    allocation: Literal["error", "uniform"] = Field(
        "error", description="error: layers lose what costs least output error; uniform: each the same share"
    )
    compensation: Compensation = Field(
        "least-squares",
        description="what stays is updated: least-squares; affine (with a bias too); bias alone; or none",
    )
    head_unit: HeadUnit = Field(
        "group",
        description="group: key-value heads with their query heads; query: query heads, the same from each group",
    )
    multiple: int = Field(32, ge=1, description="FFN widths stay multiples of it, so that kernels stay fast")
    floor: float = Field(0.25, gt=0, le=1, description="share of its units that each part keeps at least")
    damping: float = Field(1e-4, gt=0, le=1, description="added to the Gram's diagonal, as a share of its mean")

    @property
    def with_bias(self) -> bool:
        return self.compensation in ("affine", "bias")

    def slots(self, config: DecoderConfig) -> list[Slot]:
        return find_slots(config, self.parts, multiple=self.multiple, floor=self.floor, head_unit=self.head_unit)


class PruneWidth:
    """Remove FFN channels and heads, with compensation."""

    name: ClassVar[str] = "prune-width"
    what: ClassVar[str] = "remove FFN channels and attention heads; what stays makes up for them; smaller and faster"
    Settings: ClassVar[type[WidthSettings]] = WidthSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None if find_slots(config, "both", multiple=1, floor=0.01, head_unit="group") else "it has no dense part"

    def needs_calibration(self, settings: WidthSettings) -> bool:
        return True

    def config_after(self, config: DecoderConfig, settings: WidthSettings) -> DecoderConfig:
        """Shapes with the share spread evenly; `exact` says whether the real ones are these."""
        chosen = spread_evenly(settings.slots(config), settings.share)
        return shrink(config, chosen, settings.head_unit, bias=settings.with_bias)

    def exact(self, settings: WidthSettings) -> bool:
        return settings.allocation == "uniform"

    def apply(self, model: Model, settings: WidthSettings, build: Build) -> Model:
        """Raises RecipeError for packed matrices, no calibration text, or more than the floors allow."""
        refuse_packed(model, self.name, "prune25+W4A8-g32-gptq")
        slots = settings.slots(model.config)
        if settings.allocation == "uniform":
            chosen = spread_evenly(slots, settings.share)
        else:
            chosen = spread_by_error(slots, error_curves(model, slots, settings, build), settings.share)
        changes = [_cutter(part, chosen, settings) for part in ("attention", "ffn")]
        return walk_layers(model, build, changes, roles={"o", "down"}, what="removing channels and heads")


def error_curves(
    model: Model, slots: list[Slot], settings: WidthSettings, build: Build
) -> dict[Slot, tuple[float, ...]]:
    """Of every slot: output error after each step, as a share of the energy of what its layer hands on.

    The next norm divides by that energy, so an error counts as much as it is large beside the residual stream.
    """
    errors: dict[Slot, tuple[float, ...]] = {}
    energies: dict[int, float] = {}

    def look(model: Model, index: int, grams: Mapping[str, Gram]) -> Model:
        for slot in (slot for slot in slots if slot.layer == index):
            weight = torch.from_numpy(model.tensor(slot.matrix)).to(build.device)
            gram = mean_gram(grams[slot.matrix], centred=settings.with_bias)
            errors[slot] = _eliminate(model.config, slot, weight, gram, len(slot.steps), settings).errors
        return model

    def measure(index: int, hidden: Tensor) -> None:
        energies[index] = max(float(hidden.square().sum(-1).mean()), 1e-30)

    walk_layers(model, build, [look], roles={"o", "down"}, after=measure, what="error curves")
    return {slot: tuple(error / energies[slot.layer] for error in curve) for slot, curve in errors.items()}


def _eliminate(
    config: DecoderConfig, slot: Slot, weight: Tensor, gram: Tensor, steps: int, settings: WidthSettings
) -> Elimination:
    groups = None
    if slot.part == "attention" and settings.head_unit == "query":
        spec = config.layers[slot.layer].attention
        assert spec is not None
        groups = torch.arange(spec.heads, device=weight.device) // (spec.heads // spec.kv_heads)
    return eliminate(weight, gram, slot.block, slot.steps[:steps], groups=groups, damping=settings.damping)


def _cutter(part: str, chosen: Mapping[Slot, int], settings: WidthSettings) -> Change:
    by_layer = {slot.layer: slot for slot, steps in chosen.items() if slot.part == part and steps}

    def cut(model: Model, index: int, grams: Mapping[str, Gram]) -> Model:
        slot = by_layer.get(index)
        if slot is None:
            return model
        seen = grams[slot.matrix]
        weight = torch.from_numpy(model.tensor(slot.matrix)).to(seen.matrix.device)
        gram = mean_gram(seen, centred=settings.with_bias)
        gone = _eliminate(model.config, slot, weight, gram, chosen[slot], settings).first(chosen[slot])
        keep = [unit for unit in range(weight.shape[1] // slot.block) if unit not in set(gone)]
        columns = torch.from_numpy(head_columns(keep, slot.block)).to(weight.device)
        kept, shift = compensated(weight, gram, seen, columns, settings)
        if slot.part == "ffn":
            return cut_channels(model, index, keep, kept, shift)
        spec = model.config.layers[index].attention
        assert spec is not None
        each = spec.heads // spec.kv_heads
        if settings.head_unit == "query":
            return cut_heads(model, index, range(spec.kv_heads), keep, kept, shift)
        return cut_heads(model, index, keep, [group * each + i for group in keep for i in range(each)], kept, shift)

    return cut


def compensated(
    weight: Tensor, gram: Tensor, seen: Gram, columns: Tensor, settings: WidthSettings
) -> tuple[np.ndarray, np.ndarray | None]:
    """The kept columns (out, n) after compensation, and what a bias adds (out,) or None; f32."""
    kept = weight[:, columns].double()
    if settings.compensation in ("affine", "least-squares"):
        kept = least_squares(weight, gram, columns, damping=settings.damping)
    shift = None
    if settings.with_bias:
        shift = bias_shift(weight, seen.total / max(1, seen.tokens), columns, kept).float().cpu().numpy()
    return kept.float().cpu().numpy(), shift
