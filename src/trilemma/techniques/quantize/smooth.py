"""Smoothing: move outlier channels of activations into weights, where rounding hurts less; changes no result.

SmoothQuant (Xiao et al., 2023, arXiv:2211.10438). A channel whose activations are 100 times its neighbours'
takes all the steps of an int8 grid for itself. Dividing it by s and multiplying what reads it by s is the same
function. Here every s is a power of two, so that the weights stay exact in any binary float format and the
f32 model gives bit-equal logits; that costs at most a factor of sqrt(2) in how well ranges are evened out.

Pairs: attention norm -> q, k, v; v -> o; ffn norm -> gate, up (and router); up -> down of gated blocks.
Left out: what a nonlinearity separates (plain blocks' up -> down), and the final norm of a tied head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field

from trilemma.model.config import DecoderConfig, Experts
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.techniques.calibration import Gram, calibrate_layers
from trilemma.techniques.stored import refuse_packed, store_like
from trilemma.techniques.technique import Build, TechniqueSettings

_MOST = 2.0**12  # beyond it a scale tells of a dead channel, not of an outlier


class SmoothSettings(TechniqueSettings):
    """Settings of `smooth`."""

    strength: float = Field(
        0.5, ge=0, le=1, description="share of an outlier that moves into the weights: 0 none, 1 all of it"
    )


class Smooth:
    """Even out activations before they are rounded."""

    name: ClassVar[str] = "smooth"
    what: ClassVar[str] = "move activation outliers into weights (SmoothQuant); the function stays the same"
    Settings: ClassVar[type[SmoothSettings]] = SmoothSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: SmoothSettings) -> bool:
        return True

    def config_after(self, config: DecoderConfig, settings: SmoothSettings) -> DecoderConfig:
        """The same shapes."""
        return config

    def exact(self, settings: SmoothSettings) -> bool:
        return True

    def apply(self, model: Model, settings: SmoothSettings, build: Build) -> Model:
        """Raises RecipeError where matrices are packed already: smooth comes before quantization."""
        refuse_packed(model, self.name, "smooth+W8A8-g32")

        def replace(grams: Mapping[str, Gram]) -> dict[str, Float32 | StoredMatrix]:
            index = int(next(iter(grams)).split(".")[1])
            return smooth_layer(model, index, {name: gram.largest.numpy() for name, gram in grams.items()}, settings)

        return calibrate_layers(model, build, {}, replace)


def channel_scales(largest: Float32, readers: Float32, strength: float) -> Float32:
    """Powers of two near largest_j^strength / readers_j^(1 - strength), their geometric mean brought near 1.

    Args:
        largest: (channels,) largest absolute activation of each channel.
        readers: (channels,) largest absolute weight that reads it.

    Returns:
        (channels,) f32; 1 for channels that were never active or that nothing reads.
    """
    alive = (largest > 0) & (readers > 0)
    exponents = np.zeros(len(largest), np.float64)
    wanted = strength * np.log2(largest[alive]) - (1 - strength) * np.log2(readers[alive])
    exponents[alive] = np.round(wanted - wanted.mean()) if alive.any() else 0
    return np.exp2(np.clip(exponents, -np.log2(_MOST), np.log2(_MOST))).astype(np.float32)


def smooth_layer(
    model: Model, index: int, largest: Mapping[str, Float32], settings: SmoothSettings
) -> dict[str, Float32 | StoredMatrix]:
    """New tensors of one layer, given the largest inputs of its matrices by name."""
    shapes = model.config.tensor_shapes()
    layer = model.config.layers[index]
    values: dict[str, Float32] = {}

    def get(name: str) -> Float32:
        if name not in values:
            values[name] = model.tensor(name).copy()
        return values[name]

    def move(writers: list[str], readers: list[str], scales: Float32, written: Float32 | None = None) -> None:
        by = scales if written is None else written
        for name in writers:
            if name in shapes:
                get(name)[...] /= by[:, None] if get(name).ndim == 2 else by
        for name in readers:
            get(name)[...] *= scales[None, :]

    def widest(readers: list[str]) -> Float32:
        found: Float32 = np.max([np.abs(get(name)).max(axis=0) for name in readers], axis=0)
        return found

    def even_out(writer: str, readers: list[str]) -> None:
        seen = [largest[name] for name in readers if name in largest]
        scales = channel_scales(np.max(seen, axis=0), widest(readers), settings.strength)
        move([f"{writer}.weight", f"{writer}.bias"], readers, scales)

    prefix = f"layers.{index}"
    if layer.attention is not None:
        spec = layer.attention
        even_out(f"{prefix}.attention_norm", [f"{prefix}.attention.{role}.weight" for role in "qkv"])
        o = f"{prefix}.attention.o.weight"
        by_head = channel_scales_of_values(
            largest[o], np.abs(get(o)).max(axis=0), spec.kv_heads, spec.head_dim, settings.strength
        )
        repeated = np.repeat(by_head, spec.heads // spec.kv_heads, axis=0).reshape(-1)
        move([f"{prefix}.attention.v.weight", f"{prefix}.attention.v.bias"], [o], repeated, by_head.reshape(-1))
    if layer.ffn is not None:
        inner = [name for name in shapes if name.startswith(f"{prefix}.ffn.") and name.endswith(_READERS)]
        even_out(f"{prefix}.ffn_norm", inner)
        if isinstance(layer.ffn, Experts) or layer.ffn.gated:
            for down in [n for n in shapes if n.startswith(f"{prefix}.ffn.") and n.endswith(".down.weight")]:
                if down in largest:
                    even_out(down.removesuffix(".down.weight") + ".up", [down])
    return {name: store_like(model, name, array) for name, array in values.items()}  # exact: powers of two


_READERS = (".gate.weight", ".up.weight", ".router.weight")


def channel_scales_of_values(
    largest: Float32, readers: Float32, kv_heads: int, head_dim: int, strength: float
) -> Float32:
    """Scales (kv_heads, head_dim) for values that several query heads share: their columns of `o` move together."""
    shape = (kv_heads, -1, head_dim)
    shared = channel_scales(
        largest.reshape(shape).max(axis=1).reshape(-1), readers.reshape(shape).max(axis=1).reshape(-1), strength
    )
    return shared.reshape(kv_heads, head_dim)
