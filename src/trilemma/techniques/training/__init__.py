"""The one training loop and its parts; see `loop.py`."""

from trilemma.techniques.training.curve import CURVE_FILE, CurvePoint, read_curve
from trilemma.techniques.training.loop import (
    Batches,
    Loss,
    Progress,
    TrainingResult,
    mean_loss,
    next_token_loss,
    seconds_per_step,
    train,
)
from trilemma.techniques.training.optimizers import learning_rate_at, make_optimizers
from trilemma.techniques.training.settings import TrainingSettings
from trilemma.techniques.training.state import STATE_FILE
from trilemma.techniques.training.token_stream import TokenStream

__all__ = [
    "CURVE_FILE",
    "STATE_FILE",
    "Batches",
    "CurvePoint",
    "Loss",
    "Progress",
    "TokenStream",
    "TrainingResult",
    "TrainingSettings",
    "learning_rate_at",
    "make_optimizers",
    "mean_loss",
    "next_token_loss",
    "read_curve",
    "seconds_per_step",
    "train",
]
