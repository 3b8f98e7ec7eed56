"""Healing: the model learns for a short while to answer like the original, on the calibration text.

For weights in floating point, after layers, heads or channels are gone and before quantization; of a
quantized model only norms and biases can still learn (`tune-norms`). `distill` is the same after its own cut.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from trilemma.core.errors import RecipeError, StoppedError
from trilemma.model.config import DecoderConfig
from trilemma.model.decoder import Decoder, canonical_tensors
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.techniques.distill.losses import Divergence
from trilemma.techniques.distill.objective import DistillationLoss
from trilemma.techniques.distill.rounding import round_straight_through
from trilemma.techniques.distill.teacher import KeptTeacher, Teacher, TorchTeacher, WholeTeacher, decoder_identity
from trilemma.techniques.distill.windows import WindowBatches, pieces
from trilemma.techniques.stored import refuse_packed, store_like
from trilemma.techniques.technique import Build, TechniqueSettings, report
from trilemma.techniques.training import Progress, TrainingResult, TrainingSettings, mean_loss, seconds_per_step, train

_PLAIN = ("f32", "f16", "bf16")
_VALIDATIONS = 10  # points of the validation curve after the first


class HealSettings(TechniqueSettings):
    """Settings of `heal`."""

    steps: int = Field(200, ge=1, description="optimizer steps")
    batch_size: int = Field(4, ge=1, description="windows in a step")
    context: int = Field(256, ge=2, description="tokens in a window; longer calibration windows are cut")
    learning_rate: float = Field(2e-3, gt=0, description="peak learning rate")
    optimizer: Literal["adamw", "muon"] = Field("muon", description="muon: for matrices inside layers, AdamW the rest")
    trained: Literal["all", "vectors"] = Field("all", description="all weights, or norms and biases alone")
    teacher_weight: float = Field(
        1.0, ge=0, le=1, description="1: the original's answers alone; 0: the text's own next tokens alone"
    )
    divergence: Divergence = Field("forward", description="forward, reverse or skewed KL to the original")
    keep_top: int = Field(
        0, ge=0, description="keep so many of the original's likeliest tokens for later epochs; 0 asks it every time"
    )
    precision: Literal["f32", "bf16"] = Field("f32", description="bf16: products in bf16, weights stay f32")

    def training(self, batch_size: int, build: Build, *, eval_every: int = 0) -> TrainingSettings:
        """The same as settings of the training loop."""
        return TrainingSettings.model_validate({
            "steps": self.steps, "batch_size": batch_size, "context": self.context - 1, "optimizer": self.optimizer,
            "learning_rate": self.learning_rate, "schedule": "cosine", "warmup_fraction": 0.05, "final_fraction": 0.05,
            "weight_decay": 0.0, "precision": self.precision, "seed": build.seed, "threads": build.threads,
            "device": build.device, "checkpoint_every": 50 if build.work else 0, "eval_every": eval_every,
        })  # fmt: skip


class Heal:
    """Train the model on the original's answers."""

    name: ClassVar[str] = "heal"
    what: ClassVar[str] = "train the weights for a while to answer like the original; before quantization"
    Settings: ClassVar[type[HealSettings]] = HealSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: HealSettings) -> bool:
        return True

    def config_after(self, config: DecoderConfig, settings: HealSettings) -> DecoderConfig:
        return config

    def apply(self, model: Model, settings: HealSettings, build: Build) -> Model:
        """Raises RecipeError for packed weights, no calibration text, or an original of another vocabulary."""
        refuse_packed(model, self.name, "prune25+heal200+W4A8-g32-gptq (heal before you quantize)")
        return Lesson(model, build.original or model, settings, build).learn(self.name)


class Lesson:
    """One student before its teacher: the parts that training and the timing of a few steps share.

    Args:
        student, original: of one vocabulary; the student's matrices are floating point where all weights learn.
        settings: how it learns. build: text, seed, threads, device, work folder, progress.
        held_out: windows (n, context) for the validation curve, never trained on; None draws none.
        teacher: asked instead of the original's torch module, for example an engine's logits.
    """

    def __init__(
        self,
        student: Model,
        original: Model,
        settings: HealSettings,
        build: Build,
        *,
        held_out: NDArray[np.int32] | None = None,
        teacher: WholeTeacher | None = None,
    ) -> None:
        if build.calibration is None or not build.calibration.size:
            raise RecipeError("Learning from the original needs text. Give some with --data (or `data=`).")
        if original.config.vocab_size != student.config.vocab_size:
            raise RecipeError(
                f"The original has {original.config.vocab_size} tokens and the model {student.config.vocab_size}: "
                "one can learn from the other only with the same tokenizer."
            )
        for name in student:
            if settings.trained == "all" and student.format_of(name) not in _PLAIN:
                raise RecipeError(f"'{name}' is stored as {student.format_of(name)}. Heal before you quantize.")
        self.student, self.original, self.settings, self.build = student, original, settings, build
        self.batches = WindowBatches(pieces(build.calibration, settings.context), settings.batch_size, build.seed)
        self.decoder = Decoder.from_model(student)
        self._began_as = decoder_identity(self.decoder)
        self.choose_trained()
        self._held_out = None if held_out is None else pieces(held_out, settings.context)
        self._teacher = teacher
        self.result: TrainingResult | None = None
        self._folder: Path | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def choose_trained(self) -> None:
        """Let the parameters that learn require gradients, and no others."""
        for parameter in self.decoder.parameters():
            parameter.requires_grad_(self.settings.trained == "all" or parameter.ndim == 1)
        if self.settings.trained == "vectors":  # the matrices stay as they are, so they may run with rounded inputs
            round_straight_through(self.decoder, self.student)

    @property
    def training(self) -> TrainingSettings:
        every = 0 if self._held_out is None else max(1, self.settings.steps // _VALIDATIONS)
        return self.settings.training(self.batches.batch_size, self.build, eval_every=every)

    def seconds_per_step(self) -> float:
        """Of a few steps on a copy, teacher included."""
        return seconds_per_step(self.decoder, self.batches, self.loss(), self.training)

    def loss(self) -> DistillationLoss:
        """The objective with its teacher."""
        if not self.settings.teacher_weight:
            return DistillationLoss(None, 0.0)
        asked = self._open_teacher()
        teacher: Teacher = asked
        if self.settings.keep_top:
            shape = (len(self.batches.windows), self.batches.windows.shape[1] - 1)
            identity = f"{self.batches.identity} {_identity(asked)}"
            vocabulary = self.student.config.vocab_size
            teacher = KeptTeacher(asked, shape, vocabulary, self.settings.keep_top, self._store(), identity)
        return DistillationLoss(teacher, self.settings.teacher_weight, self.settings.divergence)

    def learn(self, name: str) -> Model:
        """Train to the end, from the checkpoint in the work folder when there is one.

        Raises:
            StoppedError: the user stopped it; with a work folder the same call goes on from there.
        """

        def tell(state: Progress) -> None:
            report(
                self.build, state.step, state.steps, f"{name}: step {state.step}/{state.steps}, {state.loss:.3f} nats"
            )

        self.result = train(
            self.decoder, self.batches, self.loss(), self.training, folder=self.folder(name),
            validate=self._validate(), progress=tell,
        )  # fmt: skip
        return self.finished(self.result)

    def finished(self, result: TrainingResult) -> Model:
        """The student with what it learned, stored as it was before. Raises StoppedError when it is not done."""
        if self._scratch is not None:
            self._scratch.cleanup()
        if result.finish != "steps":
            again = "The same command goes on from there." if self.build.work else "Nothing was kept."
            raise StoppedError(f"Stopped at step {result.step} of {self.settings.steps}. {again}")
        return self.student.with_tensors(self.learned())

    def learned(self) -> dict[str, Float32 | StoredMatrix]:
        """What the decoder has learned, as the student keeps it."""
        return {
            name: store_like(self.student, name, values)
            for name, values in canonical_tensors(self.decoder)
            if self.settings.trained == "all" or values.ndim == 1
        }

    def folder(self, name: str) -> Path | None:
        """Where this lesson is kept: each settings, text and student has a folder of its own."""
        if self._folder is None and self.build.work is not None:
            decides = f"{self.settings.model_dump_json()} {self.batches.identity} {self._began_as}"
            self._folder = self.build.work / f"{name}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"
        return self._folder

    def _open_teacher(self) -> WholeTeacher:
        if self._teacher is None:
            self._teacher = TorchTeacher(Decoder.from_model(self.original).to(self.build.device))
        return self._teacher

    def _validate(self) -> Callable[[nn.Module], float] | None:
        if self._held_out is None:
            return None
        weight = self.settings.teacher_weight
        loss = DistillationLoss(self._open_teacher() if weight else None, weight, self.settings.divergence)
        batches = WindowBatches(self._held_out, self.batches.batch_size)
        fixed = [batches(position) for position in range(len(self._held_out) // batches.batch_size)]
        return mean_loss(loss, fixed, self.training)

    def _store(self) -> Path:
        if self.build.work is not None:
            return self.build.work / "teacher.top"
        self._scratch = tempfile.TemporaryDirectory(prefix="trilemma-teacher-")
        return Path(self._scratch.name) / "teacher.top"


def _identity(teacher: WholeTeacher) -> str:
    return decoder_identity(teacher.decoder) if isinstance(teacher, TorchTeacher) else type(teacher).__name__
