"""Learned rounding: each layer's codes and ranges, by signed gradient descent on the layer's output error.

SignRound, published as AutoRound: Cheng et al. 2023, arXiv:2309.05516. A weight's code is round(w / s + v) with v in
[-0.5, 0.5] learned, and s (with the minimum) follows from the range of the group, whose ends have a learned factor
each. All of a layer's matrices learn together, 200 steps of falling length, so that one may undo what another does.
Inputs are those that the quantized layers before really give; what is aimed at is what the unquantized model gives.

Two things differ from the published code: ranges begin with the least squared error instead of the extreme values,
and `start: gptq` begins with GPTQ's codes instead of the nearest ones. Embedding and head are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from trilemma.core.errors import RecipeError, StoppedError
from trilemma.formats.grid import Format, QuantizedMatrix
from trilemma.formats.pack import pack
from trilemma.formats.quantize import quantize_rtn
from trilemma.model.config import DecoderConfig
from trilemma.model.decoder import DecoderLayer, layer_from_model
from trilemma.model.model import Activation, Float32, LinearRun, Model, StoredMatrix
from trilemma.runtime.reference import rounding_for
from trilemma.techniques.calibration import Gram, calibration_tokens, embed, walk_layers
from trilemma.techniques.distill.rounding import straight_through
from trilemma.techniques.distill.windows import WindowBatches
from trilemma.techniques.quantize.assignment import WeightSettings, assign_formats, assign_runs, named
from trilemma.techniques.quantize.gptq import GptqSettings, quantize_gptq
from trilemma.techniques.quantize.learned_rounding import is_learned, learn_rounding, learned_matrix
from trilemma.techniques.quantize.rtn import ScaleChoice, round_matrix, scale_rule
from trilemma.techniques.technique import Build, report
from trilemma.techniques.training import Progress, TrainingSettings, train


class SignRoundingSettings(WeightSettings):
    """Settings of `sign-rounding`."""

    steps: int = Field(200, ge=1, description="steps for each layer")
    batch_size: int = Field(4, ge=1, description="calibration windows in a step")
    learning_rate: float | None = Field(
        None, gt=0, description="length of the first step; by default 1 / steps, and it falls linearly to 0"
    )
    ranges: bool = Field(True, description="learn the range of each group too")
    start: Literal["gptq", "nearest"] = Field("gptq", description="codes to begin with")
    scale: ScaleChoice = Field("mse", description="how scales are found at first: mse, absmax or auto")


class SignRounding:
    """Quantize layer by layer, learning which way to round."""

    name: ClassVar[str] = "sign-rounding"
    what: ClassVar[str] = "learn rounding and ranges of each layer by signed gradients on calibration text (AutoRound)"
    Settings: ClassVar[type[SignRoundingSettings]] = SignRoundingSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: SignRoundingSettings) -> bool:
        return True

    def apply(self, model: Model, settings: SignRoundingSettings, build: Build) -> Model:
        """Raises StoppedError when the user stops it."""
        formats = assign_formats(model.config, settings)
        runs = assign_runs(model.config, formats, settings.activations)
        ends = {}
        for name in (name for name in formats if not name.startswith("layers.")):
            report(build, 0, len(model.config.layers), f"rtn {name}")
            ends[name] = round_matrix(name, model.tensor(name), formats[name])
        return _Walk(model, formats, runs, settings, build).go(model.with_tensors(ends, runs))


class _Walk:
    """What is carried from layer to layer: hidden states of the model as it was and as it is."""

    def __init__(
        self,
        before: Model,
        formats: Mapping[str, Format],
        runs: Mapping[str, LinearRun],
        settings: SignRoundingSettings,
        build: Build,
    ) -> None:
        self.before, self.formats, self.runs, self.settings, self.build = before, formats, runs, settings, build

    def go(self, model: Model) -> Model:
        tokens = calibration_tokens(model, self.build)
        self.exact = embed(self.before, tokens).to(self.build.device)  # (windows, context, dim)
        self.inputs = embed(model, tokens).to(self.build.device)

        def after(_: int, hidden: Tensor) -> None:
            self.inputs = hidden

        return walk_layers(model, self.build, [self.change], runs=self.runs, after=after, what="learning to round")

    def change(self, model: Model, index: int, grams: Mapping[str, Gram]) -> Model:
        _advance(layer_from_model(self.before, index, device=self.build.device), self.exact)
        layer = layer_from_model(model, index, device=self.build.device).requires_grad_(False)
        learning: dict[str, nn.Module] = {}
        for path, module in layer.named_modules():
            name = f"layers.{index}.{path}.weight"
            if isinstance(module, nn.Linear) and name in self.formats and _learns(self.formats[name]):
                learn_rounding(module, self._start(name, grams[name]))
                learning[name] = module
                module.register_forward_pre_hook(_InputRounding(self.formats[name], self.runs[name].activation))
        if learning:
            self._learn(layer, index)
        done: dict[str, Float32 | StoredMatrix] = {
            name: pack(learned_matrix(module)) for name, module in learning.items()
        }
        for name in (name for name in grams if name not in done):
            done[name] = round_matrix(name, model.tensor(name), self.formats[name])
        return model.with_tensors(done)

    def _start(self, name: str, gram: Gram) -> QuantizedMatrix:
        spec, weight, settings = self.formats[name], self.before.tensor(name), self.settings
        seen = gram.tokens > 0
        try:
            if settings.start == "gptq" and seen:
                how = GptqSettings.model_validate({"weights": spec.name, "scale": settings.scale})
                return quantize_gptq(weight, gram.hessian(), spec, how)
            importance = gram.hessian().diagonal().cpu().numpy() if seen else None
            return quantize_rtn(weight, spec, scale=scale_rule(spec, settings.scale), importance=importance)
        except RecipeError as error:
            raise named(name, error) from None

    def _learn(self, layer: DecoderLayer, index: int) -> None:
        settings, build = self.settings, self.build
        for path, parameter in layer.named_parameters():
            parameter.requires_grad_(is_learned(path, settings.ranges))
        assert build.calibration is not None
        batches = WindowBatches(build.calibration, settings.batch_size, build.seed)
        how = TrainingSettings.model_validate({
            "steps": settings.steps, "batch_size": batches.batch_size, "context": build.calibration.shape[1],
            "optimizer": "sign", "learning_rate": settings.learning_rate or 1 / settings.steps, "schedule": "wsd",
            "decay_fraction": 1, "warmup_fraction": 0, "final_fraction": 0, "gradient_clip": 0, "seed": build.seed,
            "threads": build.threads, "device": build.device, "checkpoint_every": 0, "eval_every": 0,
        })  # fmt: skip

        def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            numbers, _ = batch
            return functional.mse_loss(module(self.inputs[numbers]), self.exact[numbers])

        def tell(state: Progress) -> None:
            report(build, index, len(self.before.config.layers), f"layer {index}: step {state.step}/{state.steps}")

        if train(layer, batches, loss, how, progress=tell).finish != "steps":
            raise StoppedError(f"Stopped in layer {index}. Nothing was kept.")


def _learns(spec: Format) -> bool:
    """Codes up or down by one: not those of a codebook, which are rounded to nearest."""
    return not spec.floating and spec.values is None


@torch.no_grad()
def _advance(layer: DecoderLayer, hidden: Tensor) -> None:
    """Replace the hidden states by the layer's output, a window at a time."""
    for window in range(len(hidden)):
        hidden[window] = layer(hidden[window : window + 1])[0]


class _InputRounding:
    """A hook: inputs rounded as products with such a matrix round them, gradients as if they were not."""

    def __init__(self, spec: Format, activation: Activation) -> None:
        self.rounding = rounding_for(spec, activation)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (straight_through(args[0], self.rounding), *args[1:])
