"""Zeros among the weights: magnitude pruning and Wanda. Quality of sparsity alone: nothing gets smaller or faster.

Zeros are stored like any other value, so bytes and time stay. They would pay in a sparse kernel, and on
CPUs such a kernel gains little (50% zeros beside 4-bit codes: at most 1.3x in decode, nothing in prefill).
For a smaller and faster model remove channels, heads or layers instead (`prune-width`, `prune-depth`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from trilemma.model.config import DecoderConfig
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.techniques.calibration import Gram, calibrate_layers, side_by_side
from trilemma.techniques.prune.masks import (
    Pattern,
    lowest_of_all,
    lowest_of_groups,
    lowest_per_row,
    remaining_weights,
)
from trilemma.techniques.stored import refuse_packed, store_like
from trilemma.techniques.technique import Build, TechniqueSettings, report


class SparsitySettings(TechniqueSettings):
    """How many weights become zero, and among which they are compared."""

    share: float = Field(0.5, gt=0, lt=1, description="share of the weights inside layers that become zero")
    pattern: str | None = Field(
        None, description="zeros:group along a row, such as 2:4 or 4:8; it then decides the share"
    )

    @field_validator("pattern")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None:
            Pattern.read(value)
        return value

    def mask(self, scores: Tensor, *, whole: bool = False) -> Tensor:
        """True (out, in) where a weight goes."""
        if self.pattern is not None:
            return lowest_of_groups(scores, Pattern.read(self.pattern))
        return lowest_of_all(scores, self.share) if whole else lowest_per_row(scores, self.share)


class MagnitudeSettings(SparsitySettings):
    """Settings of `magnitude`."""

    compare: Literal["row", "matrix"] = Field("matrix", description="the smallest of each row, or of each matrix")


class Magnitude:
    """Zero the smallest weights."""

    name: ClassVar[str] = "magnitude"
    what: ClassVar[str] = "zero the smallest weights; the baseline of pruning; saves neither bytes nor time"
    Settings: ClassVar[type[MagnitudeSettings]] = MagnitudeSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: MagnitudeSettings) -> bool:
        return False

    def config_after(self, config: DecoderConfig, settings: MagnitudeSettings) -> DecoderConfig:
        return config

    def exact(self, settings: MagnitudeSettings) -> bool:
        return True

    def apply(self, model: Model, settings: MagnitudeSettings, build: Build) -> Model:
        refuse_packed(model, self.name, "magnitude50+W8A8")
        names = model.config.linear_names()
        replaced: dict[str, Float32 | StoredMatrix] = {}
        for done, name in enumerate(names):
            report(build, done, len(names), f"magnitude {name}")
            weight = torch.from_numpy(model.tensor(name))
            mask = settings.mask(weight.abs(), whole=settings.compare == "matrix")
            replaced[name] = store_like(model, name, weight.masked_fill(mask, 0).numpy())
        return model.with_tensors(replaced)


class WandaSettings(SparsitySettings):
    """Settings of `wanda`."""

    update: bool = Field(False, description="let the remaining weights make up for the zeros, as SparseGPT does")
    damping: float = Field(0.01, gt=0, le=1, description="of that update: added to the Hessian's diagonal, as a share")


class Wanda:
    """Zero the weights that matter least to each output on calibration text.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023
    (arXiv:2306.11695): the score of a weight is |w| times the norm of its input, compared within a row.
    Layers are calibrated on what the pruned layers before them produce.
    """

    name: ClassVar[str] = "wanda"
    what: ClassVar[str] = "zero the weights of least |w| x input norm in each row; saves neither bytes nor time"
    Settings: ClassVar[type[WandaSettings]] = WandaSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: WandaSettings) -> bool:
        return True

    def config_after(self, config: DecoderConfig, settings: WandaSettings) -> DecoderConfig:
        return config

    def exact(self, settings: WandaSettings) -> bool:
        return True

    def apply(self, model: Model, settings: WandaSettings, build: Build) -> Model:
        refuse_packed(model, self.name, "wanda50+W8A8")

        def prune(found: tuple[str, Gram]) -> Float32 | StoredMatrix:
            name, gram = found
            weight = torch.from_numpy(model.tensor(name)).to(gram.matrix.device)
            mask = settings.mask(wanda_scores(weight, gram))
            if settings.update:
                kept = remaining_weights(weight, gram.hessian(), mask, damping=settings.damping)
            else:
                kept = weight.masked_fill(mask, 0)
            return store_like(model, name, kept.cpu().numpy())

        def replace(grams: Mapping[str, Gram]) -> dict[str, Float32 | StoredMatrix]:
            return dict(zip(grams, side_by_side(prune, grams.items(), build.threads), strict=True))

        return calibrate_layers(model, build, {}, replace)


def wanda_scores(weight: Tensor, gram: Gram) -> Tensor:
    """|W| times each input's norm over the calibration tokens, (out, in)."""
    return weight.abs() * gram.matrix.diagonal().clamp(min=0).sqrt()
