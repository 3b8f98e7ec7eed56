"""Cast every matrix to one floating-point format: the unquantized ends of the front."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trilemma.formats import FORMATS
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Activation, LinearRun, Model
from trilemma.model.plain import PlainDtype
from trilemma.techniques.quantize.assignment import assign_runs
from trilemma.techniques.quantize.rtn import round_matrix
from trilemma.techniques.technique import Build, TechniqueSettings, report


class PlainSettings(TechniqueSettings):
    """Settings of `plain`."""

    dtype: PlainDtype = Field("bf16", description="f32, f16 or bf16")
    activations: Activation | None = Field(
        None, description="input precision of the products: f32 or bf16; by default bf16 for bf16 weights, else f32"
    )


class Plain:
    """Keep or make a model floating point."""

    name: ClassVar[str] = "plain"
    what: ClassVar[str] = "store weights as f32, f16 or bf16"
    Settings: ClassVar[type[PlainSettings]] = PlainSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: PlainSettings) -> bool:
        return False

    def apply(self, model: Model, settings: PlainSettings, build: Build) -> Model:
        spec = FORMATS.get(settings.dtype)
        shapes = model.config.tensor_shapes()
        matrices = {name: spec for name, shape in shapes.items() if len(shape) == 2}
        replaced = {}
        for done, name in enumerate(matrices):
            report(build, done, len(matrices), f"{settings.dtype} {name}")
            if model.format_of(name) != settings.dtype:
                replaced[name] = round_matrix(name, model.tensor(name), spec)
        runs = assign_runs(model.config, matrices, "bf16")
        if settings.activations is not None:
            runs = dict.fromkeys(runs, LinearRun(activation=settings.activations))
        return model.with_tensors(replaced, runs)
