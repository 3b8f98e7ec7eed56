"""A short retraining that keeps every code: scales and minima of quantized matrices learn, and norms and biases too.

The second phase of EfficientQAT (Chen et al. 2024, arXiv 2407.11062), with KL to the unquantized model as its loss.
Scales and minima go back to f16, so the artifact keeps its size and speed. Activations are rounded on the way forward
as they will be, and so are scales; gradients pass straight through (Bengio et al. 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from trilemma.core.errors import RecipeError
from trilemma.formats.pack import pack
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.techniques.distill.grids import learned_parameters, put_on_grids
from trilemma.techniques.distill.heal import HealSettings, Lesson
from trilemma.techniques.distill.rounding import round_straight_through
from trilemma.techniques.technique import Build, TechniqueSettings


class TuneScalesSettings(TechniqueSettings):
    """Settings of `tune-scales`."""

    steps: int = Field(100, ge=1, description="optimizer steps")
    batch_size: int = Field(4, ge=1, description="calibration windows in a step")
    context: int = Field(256, ge=2, description="tokens of each window that are used")
    learning_rate: float = Field(
        2e-3, gt=0, description="peak learning rate of AdamW, relative: 0.002 moves a scale by 0.2% a step"
    )
    precision: Literal["f32", "bf16"] = Field("f32", description="bf16: products in bf16 while training")
    norms: bool = Field(True, description="train norms and biases too")
    embedding: bool = Field(True, description="train the scales of embedding and head too")


class TuneScales:
    """Repair a quantized model without touching its codes, by its scales."""

    name: ClassVar[str] = "tune-scales"
    what: ClassVar[str] = "train scales, minima and norms, after quantization, to answer like the original"
    Settings: ClassVar[type[TuneScalesSettings]] = TuneScalesSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: TuneScalesSettings) -> bool:
        return True

    def config_after(self, config: DecoderConfig, settings: TuneScalesSettings) -> DecoderConfig:
        """The same shapes."""
        return config

    def exact(self, settings: TuneScalesSettings) -> bool:
        return True

    def apply(self, model: Model, settings: TuneScalesSettings, build: Build) -> Model:
        """Raises RecipeError without calibration windows, or with an original of another vocabulary."""
        how = _Training.model_validate(settings.model_dump() | {"optimizer": "adamw", "trained": "vectors"})
        return ScaleLesson(model, build.original or model, how, build).learn(self.name)


class _Training(HealSettings):
    """The same settings, for the lesson; they name its folder."""

    norms: bool = True
    embedding: bool = True


class ScaleLesson(Lesson):
    """A lesson in which scales and minima learn."""

    settings: _Training

    def choose_trained(self) -> None:
        settings = self.settings
        assert isinstance(settings, _Training)
        for parameter in self.decoder.parameters():
            parameter.requires_grad_(settings.norms and parameter.ndim == 1)
        self.grids = put_on_grids(self.decoder, self.student, settings.embedding)
        if not self.grids and not settings.norms:
            raise RecipeError(
                "'tune-scales' without norms trains the scales of quantized matrices, and here are none. "
                "Quantize first: W4A8-g32-gptq+scales100."
            )
        for name in self.grids:
            for parameter in learned_parameters(self.decoder, name):
                parameter.requires_grad_(True)
        round_straight_through(self.decoder, self.student)

    def learned(self) -> dict[str, Float32 | StoredMatrix]:
        found: dict[str, Float32 | StoredMatrix] = {
            name: pack(grid.learned(*learned_parameters(self.decoder, name))) for name, grid in self.grids.items()
        }
        state = self.decoder.state_dict()
        for name, shape in self.student.config.tensor_shapes().items():
            if len(shape) == 1:
                found[name] = state[name].detach().cpu().numpy().copy()
        return found
