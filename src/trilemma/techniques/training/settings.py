"""How a training run goes, as one record."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trilemma.techniques.technique import TechniqueSettings


class TrainingSettings(TechniqueSettings):
    """How to train. Fractions are of `steps`."""

    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(8, ge=1, description="windows in a batch")
    context: int = Field(512, ge=1, description="tokens in a window")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are averaged in a step")
    optimizer: Literal["adamw", "muon", "sign"] = Field(
        "adamw", description="muon: Muon for matrices inside layers, AdamW for the rest; sign: steps of one length"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up: cosine, warm-up-stable-decay, or constant"
    )
    warmup_fraction: float = Field(0.02, ge=0, le=1, description="linear warm-up")
    decay_fraction: float = Field(0.2, ge=0, le=1, description="linear decay at the end of schedule wsd")
    final_fraction: float = Field(0.1, ge=0, le=1, description="last learning rate as a part of the peak")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's mean of gradients")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's mean of squares")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    weight_decay: float = Field(0.1, ge=0, description="decoupled, on matrices only")
    gradient_clip: float = Field(1.0, ge=0, description="largest global norm of the gradient; 0 never clips")
    precision: Literal["f32", "bf16"] = Field("f32", description="bf16: autocast; weights and optimizer stay f32")
    seed: int = Field(0, ge=0, description="of dropout and the like; data and initial weights have their own")
    threads: int | None = Field(None, ge=1, description="CPU threads; None leaves torch's setting")
    device: str = Field("cpu", description="torch device: cpu, cuda, cuda:1")
    time_limit_s: float | None = Field(None, gt=0, description="stop cleanly after so long; resumable")
    checkpoint_every: int = Field(200, ge=0, description="steps between checkpoints; 0 writes only the last")
    eval_every: int = Field(200, ge=0, description="steps between validations; 0 validates only at the end")
    log_every: int = Field(10, ge=1, description="steps between points of the learning curve")


FREE_ON_RESUME = {"threads", "device", "time_limit_s", "checkpoint_every", "eval_every", "log_every"}
"""Settings that a resumed run may change: all but the number of threads leave its weights the same."""
