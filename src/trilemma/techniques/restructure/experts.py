"""A dense feed-forward block becomes a shared block and routed experts, without training.

All weights stay; a token uses only some of them. Channels are shared out by when they contribute, a router
learns from calibration text which experts a token needs, and the way down makes up for those that are silent.
With every expert active the block is the dense one. Layers are changed in order, each on the text as the
changed layers before it hand it on.

Left out: training of router and experts afterwards (`heal` does that), and experts for attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trilemma.core.errors import RecipeError
from trilemma.formats.plain import to_plain
from trilemma.model.blocks import activate
from trilemma.model.config import DecoderConfig, Dense, Experts
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.model.plain import PlainDtype
from trilemma.techniques.calibration import Gram, walk_layers
from trilemma.techniques.prune.cut import with_layer
from trilemma.techniques.restructure.partition import (
    Partition,
    captured,
    chosen_experts,
    conditional_least_squares,
    expert_energy,
    fit_router,
    partition_channels,
    representatives,
)
from trilemma.techniques.stored import refuse_packed
from trilemma.techniques.technique import Build, TechniqueSettings


class ExpertsSettings(TechniqueSettings):
    """Settings of `experts`."""

    count: int = Field(8, ge=2, le=256, description="routed experts of each layer")
    active: int = Field(4, ge=1, description="experts that run for a token")
    shared: float = Field(0.25, ge=0, lt=1, description="least share of the channels that always run")
    multiple: int = Field(32, ge=1, description="an expert's width is a multiple of it, so that kernels stay fast")
    router: Literal["auto", "linear", "glu"] = Field(
        "auto", description="linear: fitted scores; glu: representative channels (CMoE); auto: what captures more"
    )
    compensation: bool = Field(True, description="let the way down make up for silent experts (least squares)")
    sample: int = Field(8_192, ge=64, description="calibration tokens that the layers are fitted on")
    damping: float = Field(0.02, gt=0, description="holds compensated weights near their old values")

    def width(self, hidden: int) -> int:
        """Channels of an expert of a block of `hidden` channels; 0 when it is too narrow."""
        return int((1 - self.shared) * hidden / self.count) // self.multiple * self.multiple


class MakeExperts:
    """Use only part of the weights: the other way than pruning them."""

    name: ClassVar[str] = "experts"
    what: ClassVar[str] = (
        "dense feed-forward blocks become shared and routed experts; all weights stay, part of them runs"
    )
    Settings: ClassVar[type[ExpertsSettings]] = ExpertsSettings

    def supports(self, config: DecoderConfig) -> str | None:
        if any(_convertible(layer.ffn) for layer in config.layers):
            return None
        return "it has no gated dense feed-forward block without biases inside"

    def needs_calibration(self, settings: ExpertsSettings) -> bool:
        return True

    def apply(self, model: Model, settings: ExpertsSettings, build: Build) -> Model:
        """Raises RecipeError for packed weights, more active experts than there are, or blocks too narrow."""
        refuse_packed(model, self.name, "experts8x4+W8A8-g32")
        if settings.active > settings.count:
            raise RecipeError(
                f"'active' is {settings.active} of {settings.count} experts; give at most {settings.count}."
            )
        widest = max((layer.ffn.hidden for layer in model.config.layers if isinstance(layer.ffn, Dense)), default=0)
        if not settings.width(widest):
            raise RecipeError(
                f"{settings.count} experts of at least {settings.multiple} channels do not fit the widest block "
                f"({widest} channels, {settings.shared:.0%} of them shared). Ask for fewer experts."
            )

        def change(model: Model, index: int, grams: Mapping[str, Gram]) -> Model:
            spec = model.config.layers[index].ffn
            if not (isinstance(spec, Dense) and _convertible(spec) and settings.width(spec.hidden)):
                return model
            inputs = grams[f"layers.{index}.ffn.up.weight"].rows
            return _with_experts(model, index, inputs, settings, build.seed)

        return walk_layers(model, build, [change], roles={"up"}, sample=settings.sample, what="sharing out channels")


def _convertible(spec: Dense | Experts | None) -> bool:
    return isinstance(spec, Dense) and spec.gated and not spec.bias


def _with_experts(model: Model, index: int, inputs: Tensor, settings: ExpertsSettings, seed: int) -> Model:
    layer = model.config.layers[index]
    dense = layer.ffn
    assert isinstance(dense, Dense)
    prefix = f"layers.{index}.ffn"
    gate, up, down = (torch.from_numpy(model.tensor(f"{prefix}.{role}.weight")) for role in ("gate", "up", "down"))
    with torch.no_grad():
        hidden = activate(inputs @ gate.T, dense.activation) * (inputs @ up.T)  # (tokens, channels)
        contributions = hidden.abs() * down.norm(dim=0)
        partition = partition_channels(contributions, settings.count, settings.width(dense.hidden), seed=seed)
        energy = expert_energy(contributions, partition)
        kind, router, chosen = _route(inputs, hidden, energy, partition, gate, up, settings, dense.activation)
        bias = None
        if settings.compensation and settings.active < settings.count:
            masked = hidden * _mask(partition, chosen, hidden.shape[1])
            down, bias = conditional_least_squares(hidden, masked, down, settings.damping)
    experts = Experts(
        count=settings.count, active=settings.active, hidden=settings.width(dense.hidden), activation=dense.activation,
        router=kind, gates="one", shared_hidden=len(partition.shared), down_bias=bias is not None or dense.down_bias,
    )  # fmt: skip
    tensors: dict[str, Float32 | StoredMatrix] = {f"{prefix}.router.weight": router.contiguous().numpy()}
    blocks = {"shared": partition.shared} if len(partition.shared) else {}
    blocks |= {f"experts.{number}": channels for number, channels in enumerate(partition.experts)}
    for block, channels in blocks.items():
        for role, values in (("gate", gate[channels]), ("up", up[channels]), ("down", down[:, channels])):
            stored_as = model.format_of(f"{prefix}.{role}.weight")
            tensors[f"{prefix}.{block}.{role}.weight"] = _as(stored_as, values)
    if experts.down_bias:
        before = torch.from_numpy(model.tensor(f"{prefix}.down.bias")) if dense.down_bias else 0.0
        tensors[f"{prefix}.down.bias"] = (before + (bias if bias is not None else 0.0)).numpy()  # type: ignore[union-attr]
    config = with_layer(model.config, index, layer.model_copy(update={"ffn": experts}))
    return model.with_config(config).with_tensors(tensors)


def _route(
    inputs: Tensor, hidden: Tensor, energy: Tensor, partition: Partition, gate: Tensor, up: Tensor,
    settings: ExpertsSettings, activation: str,
) -> tuple[Literal["linear", "glu"], Tensor, Tensor]:  # fmt: skip
    """The router's kind, its weights, and the experts that it chooses, (tokens, experts) bool.

    'auto' fits on the even tokens and keeps what captures more energy on the odd ones.
    """
    fit = slice(None) if settings.router != "auto" else slice(0, None, 2)
    channels = representatives(hidden[fit], energy[fit], partition)
    glu = torch.cat([gate[channels], up[channels]])
    by_channel = hidden[:, channels].abs()
    if settings.router == "glu":
        return "glu", glu, chosen_experts(by_channel, settings.active)
    linear = fit_router(inputs[fit], energy[fit])
    by_score = inputs @ linear.T
    if settings.router == "auto":
        held = slice(1, None, 2)
        found = [
            captured(energy[held], chosen_experts(scores[held], settings.active)) for scores in (by_score, by_channel)
        ]
        if found[1] > found[0]:
            return "glu", glu, chosen_experts(by_channel, settings.active)
    return "linear", linear, chosen_experts(by_score, settings.active)


def _mask(partition: Partition, chosen: Tensor, channels: int) -> Tensor:
    """(tokens, channels) bool: shared channels and those of the chosen experts."""
    mask = torch.ones(len(chosen), channels, dtype=torch.bool)
    for expert, members in enumerate(partition.experts):
        mask[:, members] = chosen[:, expert : expert + 1]
    return mask


def _as(dtype: str, values: Tensor) -> Float32 | StoredMatrix:
    plain: dict[str, PlainDtype] = {"f16": "f16", "bf16": "bf16"}
    array = values.contiguous().numpy()
    return to_plain(array, plain[dtype]) if dtype in plain else array
