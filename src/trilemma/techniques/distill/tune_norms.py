"""A short retraining that keeps every code: only norms and biases learn, from the unquantized model's own answers.

These vectors are a few thousandths of a model and are stored in f32 anyway, so the artifact keeps its size and
speed. The loss is KL to the original (quantization-aware distillation); activations are rounded on the way
forward as they will be, and gradients pass straight through the rounding (Bengio et al. 2013, arXiv 1308.3432).
Norm and bias tuning after quantization: Li et al. 2023 (Norm Tweaking, arXiv 2309.02784).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trilemma.model.config import DecoderConfig
from trilemma.model.model import Model
from trilemma.techniques.distill.heal import HealSettings, Lesson
from trilemma.techniques.technique import Build, TechniqueSettings


class TuneNormsSettings(TechniqueSettings):
    """Settings of `tune-norms`."""

    steps: int = Field(100, ge=1, description="optimizer steps")
    batch_size: int = Field(1, ge=1, description="calibration windows in a step")
    context: int = Field(256, ge=2, description="tokens of each window that are used")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")


class TuneNorms:
    """Repair a quantized model without touching its codes."""

    name: ClassVar[str] = "tune-norms"
    what: ClassVar[str] = "train norms and biases alone, after quantization, to answer like the original"
    Settings: ClassVar[type[TuneNormsSettings]] = TuneNormsSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: TuneNormsSettings) -> bool:
        return True

    def config_after(self, config: DecoderConfig, settings: TuneNormsSettings) -> DecoderConfig:
        """The same shapes."""
        return config

    def exact(self, settings: TuneNormsSettings) -> bool:
        return True

    def apply(self, model: Model, settings: TuneNormsSettings, build: Build) -> Model:
        """Raises RecipeError without calibration windows or with an original of another vocabulary."""
        how = HealSettings.model_validate(settings.model_dump() | {"optimizer": "adamw", "trained": "vectors"})
        return Lesson(model, build.original or model, how, build).learn(self.name)
