"""Smoothing: move outlier channels of activations into weights, where rounding hurts less; changes no result.

SmoothQuant (Xiao et al., 2023, arXiv:2211.10438). A channel whose activations are 100 times its neighbours'
takes all the steps of an int8 grid for itself. Dividing it by s and multiplying what reads it by s is the same
function. Here every s is a power of two, so that the weights stay exact in any binary float format and the
f32 model gives bit-equal logits; that costs at most a factor of sqrt(2) in how well ranges are evened out.

Where scales can go is said in `folding.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field

from trilemma.model.config import DecoderConfig
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.techniques.calibration import Gram, calibrate_layers
from trilemma.techniques.quantize.folding import Folded, folds
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
            return smooth_layer(
                model, index, {name: gram.largest.cpu().numpy() for name, gram in grams.items()}, settings
            )

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
    folded = Folded(model)
    for place in folds(model.config, index):
        seen = [largest[name] for name in place.readers if name in largest]
        if not seen:  # an expert without statistics
            continue
        widest = np.max([np.abs(folded.get(name)).max(axis=0) for name in place.readers], axis=0)
        active = place.of_channels(np.max(seen, axis=0))
        folded.fold(place, channel_scales(active, place.of_channels(widest), settings.strength))
    return {name: store_like(model, name, array) for name, array in folded.values.items()}  # exact: powers of two
