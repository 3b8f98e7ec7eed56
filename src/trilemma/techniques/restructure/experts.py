"""A dense feed-forward block becomes a shared block and routed experts, without training.

All weights stay; a token uses only some of them. Channels are shared out by when they contribute, a router
learns from calibration text which experts a token needs, and the way down makes up for those that are silent.
With every expert active the block is the dense one. Layers are changed in order, each on the text as the
changed layers before it hand it on.

Left out: training of router and experts afterwards (`heal` does that), and experts for attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trilemma.core.errors import RecipeError
from trilemma.formats.plain import to_plain
from trilemma.model.blocks import activate
from trilemma.model.config import DecoderConfig, Dense, Experts, is_router
from trilemma.model.model import Float32, LinearRun, Model, StoredMatrix
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

_OF_A_BLOCK = re.compile(r"\.ffn\.(shared|experts\.\d+)\.")


class ExpertsSettings(TechniqueSettings):
    """Settings of `experts`."""

    count: int = Field(8, ge=2, le=256, description="routed experts of each layer")
    active: int = Field(4, ge=1, description="experts that run for a token")
    shared: float = Field(0.25, ge=0, lt=1, description="least share of the channels that always run")
    multiple: int = Field(32, ge=1, description="an expert's width is a multiple of it, so that kernels stay fast")
    router: Literal["auto", "linear", "glu"] = Field(
        "linear", description="linear: fitted scores; glu: representative channels (CMoE); auto: what captures more"
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

    def config_after(self, config: DecoderConfig, settings: ExpertsSettings) -> DecoderConfig:
        """Raises RecipeError for more active experts than there are, or blocks too narrow."""
        _check(config, settings)
        kind: Literal["linear", "glu"] = "glu" if settings.router == "glu" else "linear"
        for index, layer in enumerate(config.layers):
            if isinstance(layer.ffn, Dense) and _fits(layer.ffn, settings):
                spec = _experts_of(layer.ffn, settings, kind)
                config = with_layer(config, index, layer.model_copy(update={"ffn": spec}))
        return config

    def exact(self, settings: ExpertsSettings) -> bool:
        return settings.router != "auto"

    def origin(self, name: str) -> str | None:
        return None if is_router(name) else _OF_A_BLOCK.sub(".ffn.", name)

    def apply(self, model: Model, settings: ExpertsSettings, build: Build) -> Model:
        """Raises RecipeError as `config_after`, and for packed weights."""
        refuse_packed(model, self.name, "experts8x4+W8A8-g32")
        _check(model.config, settings)

        def change(model: Model, index: int, grams: Mapping[str, Gram]) -> Model:
            spec = model.config.layers[index].ffn
            if not (isinstance(spec, Dense) and _fits(spec, settings)):
                return model
            inputs = grams[f"layers.{index}.ffn.up.weight"].rows
            return _with_experts(model, index, inputs, settings, build.seed)

        return walk_layers(model, build, [change], roles={"up"}, sample=settings.sample, what="sharing out channels")


def _check(config: DecoderConfig, settings: ExpertsSettings) -> None:
    if settings.active > settings.count:
        raise RecipeError(f"'active' is {settings.active} of {settings.count} experts; give at most {settings.count}.")
    widest = max((layer.ffn.hidden for layer in config.layers if isinstance(layer.ffn, Dense)), default=0)
    if not settings.width(widest):
        raise RecipeError(
            f"{settings.count} experts of at least {settings.multiple} channels do not fit the widest block "
            f"({widest} channels, {settings.shared:.0%} of them shared). Ask for fewer experts."
        )


def _fits(spec: Dense, settings: ExpertsSettings) -> bool:
    return _convertible(spec) and settings.width(spec.hidden) > 0


def _experts_of(dense: Dense, settings: ExpertsSettings, router: Literal["linear", "glu"]) -> Experts:
    width = settings.width(dense.hidden)
    compensated = settings.compensation and settings.active < settings.count
    return Experts(
        count=settings.count, active=settings.active, hidden=width, activation=dense.activation, router=router,
        gates="one", shared_hidden=dense.hidden - settings.count * width, down_bias=compensated or dense.down_bias,
    )  # fmt: skip


def _convertible(spec: Dense | Experts | None) -> bool:
    return isinstance(spec, Dense) and spec.gated and not spec.bias


def _with_experts(model: Model, index: int, inputs: Tensor, settings: ExpertsSettings, seed: int) -> Model:
    layer = model.config.layers[index]
    dense = layer.ffn
    assert isinstance(dense, Dense)
    prefix = f"layers.{index}.ffn"
    gate, up, down = (
        torch.from_numpy(model.tensor(f"{prefix}.{role}.weight")).to(inputs.device) for role in ("gate", "up", "down")
    )
    with torch.no_grad():
        hidden = activate(inputs @ gate.T, dense.activation) * (inputs @ up.T)  # (tokens, channels)
        contributions = hidden.abs() * down.norm(dim=0)
        partition = partition_channels(contributions, settings.count, settings.width(dense.hidden), seed=seed)
        energy = expert_energy(contributions, partition)
        kind, router, chosen = _route(inputs, hidden, energy, partition, gate, up, settings)
        bias = None
        if settings.compensation and settings.active < settings.count:
            masked = hidden * _mask(partition, chosen, hidden.shape[1])
            down, bias = conditional_least_squares(hidden, masked, down, settings.damping)
    experts = _experts_of(dense, settings, kind)
    tensors: dict[str, Float32 | StoredMatrix] = {f"{prefix}.router.weight": _array(router)}
    linears: dict[str, LinearRun] = {}
    blocks = {"shared": partition.shared} if len(partition.shared) else {}
    blocks |= {f"experts.{number}": channels for number, channels in enumerate(partition.experts)}
    for block, channels in blocks.items():
        for role, values in (("gate", gate[channels]), ("up", up[channels]), ("down", down[:, channels])):
            old, new = f"{prefix}.{role}.weight", f"{prefix}.{block}.{role}.weight"
            tensors[new], linears[new] = _as(model.format_of(old), values), model.linear(old)
    if experts.down_bias:
        before = torch.from_numpy(model.tensor(f"{prefix}.down.bias")) if dense.down_bias else torch.zeros(len(down))
        before = before.to(down)
        tensors[f"{prefix}.down.bias"] = _array(before + bias if bias is not None else before)
    config = with_layer(model.config, index, layer.model_copy(update={"ffn": experts}))
    return model.with_config(config).with_tensors(tensors, linears)


def _route(
    inputs: Tensor, hidden: Tensor, energy: Tensor, partition: Partition, gate: Tensor, up: Tensor,
    settings: ExpertsSettings,
) -> tuple[Literal["linear", "glu"], Tensor, Tensor]:  # fmt: skip
    """The router's kind, its weights, and the experts that it chooses, (tokens, experts) bool.

    'auto' fits on the even tokens and keeps what captures more energy on the odd ones.
    """
    fit = slice(None) if settings.router != "auto" else slice(0, None, 2)
    found: dict[Literal["linear", "glu"], tuple[Tensor, Tensor]] = {}
    if settings.router != "glu":
        router = fit_router(inputs[fit], energy[fit])
        found["linear"] = router, chosen_experts(inputs @ router.T, settings.active)
    if settings.router != "linear":
        channels = representatives(hidden[fit], energy[fit], partition)
        scores = hidden[:, channels].abs()
        found["glu"] = torch.cat([gate[channels], up[channels]]), chosen_experts(scores, settings.active)
    kind = max(found, key=lambda kind: captured(energy[1::2], found[kind][1][1::2]))
    return kind, *found[kind]


def _mask(partition: Partition, chosen: Tensor, channels: int) -> Tensor:
    """(tokens, channels) bool: shared channels and those of the chosen experts."""
    mask = torch.ones(len(chosen), channels, dtype=torch.bool, device=chosen.device)
    for expert, members in enumerate(partition.experts):
        mask[:, members] = chosen[:, expert : expert + 1]
    return mask


def _as(dtype: str, values: Tensor) -> Float32 | StoredMatrix:
    plain: dict[str, PlainDtype] = {"f16": "f16", "bf16": "bf16"}
    return to_plain(_array(values), plain[dtype]) if dtype in plain else _array(values)


def _array(values: Tensor) -> Float32:
    found: Float32 = values.contiguous().cpu().numpy()
    return found
