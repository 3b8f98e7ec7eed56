"""A short retraining that keeps every code: only norms and biases learn, from the unquantized model's own answers.

These vectors are a few thousandths of a model and are stored in f32 anyway, so the artifact keeps its size and
speed. The loss is KL to the original (quantization-aware distillation); activations are rounded on the way
forward as they will be, and gradients pass straight through the rounding (Bengio et al. 2013, arXiv 1308.3432).
Norm and bias tuning after quantization: Li et al. 2023 (Norm Tweaking, arXiv 2309.02784).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from trilemma.core.errors import RecipeError
from trilemma.model.config import DecoderConfig
from trilemma.model.decoder import Decoder
from trilemma.model.model import Activation, Float32, Model, StoredMatrix
from trilemma.techniques.calibration import round_activations
from trilemma.techniques.distill.objective import DistillationLoss
from trilemma.techniques.distill.teacher import TorchTeacher
from trilemma.techniques.distill.windows import WindowBatches
from trilemma.techniques.technique import Build, TechniqueSettings, report
from trilemma.techniques.training import Progress, TrainingSettings, train


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
        """Raises RecipeError without calibration windows or an original of the same vocabulary."""
        if build.calibration is None or not build.calibration.size:
            raise RecipeError("Tuning needs calibration text. Give some with --data (or `data=`).")
        original = build.original or model
        if original.config.vocab_size != model.config.vocab_size:
            raise RecipeError("The original has another vocabulary; the model can not learn from its answers.")
        student = Decoder.from_model(model)
        vectors = {name: p for name, p in student.named_parameters() if p.ndim == 1}
        student.requires_grad_(False)
        for parameter in vectors.values():
            parameter.requires_grad_(True)
        round_straight_through(student, model)
        windows = build.calibration[:, : settings.context]
        batches = WindowBatches(windows, settings.batch_size, build.seed)
        how = TrainingSettings.model_validate({
            "steps": settings.steps, "batch_size": batches.batch_size, "context": windows.shape[1],
            "learning_rate": settings.learning_rate, "weight_decay": 0.0, "warmup_fraction": 0.1, "seed": build.seed,
            "threads": build.threads, "device": build.device, "checkpoint_every": 0, "eval_every": 0,
        })  # fmt: skip

        def tell(state: Progress) -> None:
            report(build, state.step, state.steps, f"tuning norms, loss {state.loss:.4g}")

        teacher = TorchTeacher(Decoder.from_model(original).to(build.device))
        result = train(student, batches, DistillationLoss(teacher), how, progress=tell)
        if result.finish == "interrupted":
            raise KeyboardInterrupt
        tuned: dict[str, Float32 | StoredMatrix] = {
            name: parameter.detach().cpu().numpy().copy() for name, parameter in vectors.items()
        }
        return model.with_tensors(tuned)


def round_straight_through(decoder: Decoder, model: Model) -> None:
    """Let every product see its input rounded as `model` says; gradients pass as if it were not."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            _hook_input(module, model.linear(f"{name}.weight").activation)
    if decoder.head is None:  # the final norm's only reader is then the tied head
        activation = model.linear("embedding.weight").activation
        decoder.final_norm.register_forward_hook(lambda _, __, output: _rounded(output, activation))


def _hook_input(module: nn.Linear, activation: Activation) -> None:
    if activation != "f32":
        module.register_forward_pre_hook(lambda _, args: (_rounded(args[0], activation),))


def _rounded(x: Tensor, activation: Activation) -> Tensor:
    if activation == "f32":
        return x
    with torch.no_grad():
        target = round_activations(x) if activation == "int8-g32" else x.to(torch.bfloat16).to(x.dtype)
        shift = target - x
    return x + shift
