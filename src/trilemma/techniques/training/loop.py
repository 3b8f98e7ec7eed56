"""The one training loop: pretraining, distillation, healing and quantization-aware training share it.

The caller brings the module, the batches (a function of the position alone) and the loss. The loop
brings the optimizer, the schedule, precision, checkpoints, the learning curve and a clean stop.
A run that is killed and started again ends in the same bits as one that was not, on the same host,
device, versions and threads. It draws nothing: the curve is JSON lines for others to draw.
One process only: training across processes is torchrun's work.
"""

from __future__ import annotations

import copy
import itertools
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trilemma.core.errors import CheckpointError, TrainingError
from trilemma.techniques.torch_device import check_device
from trilemma.techniques.training.curve import CurvePoint, append_point, read_curve, write_curve
from trilemma.techniques.training.optimizers import learning_rate_at, make_optimizers
from trilemma.techniques.training.settings import FREE_ON_RESUME, TrainingSettings
from trilemma.techniques.training.state import read_facts, restore_state, save_state

Batches = Callable[[int], Any]
"""Position -> batch: a tensor, or a tuple, list or dict of tensors. An `identity` attribute guards resumes."""
Loss = Callable[[nn.Module, Any], Tensor]
Finish = Literal["steps", "time", "interrupted"]


@dataclass(frozen=True)
class Progress:
    """Told after each step. `seconds_left` assumes the pace of this run."""

    step: int
    steps: int
    tokens: int
    seconds: float
    seconds_left: float
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class TrainingResult:
    """`seconds` sums all runs of a resumed training; a loss is None when nothing measured it."""

    finish: Finish
    step: int
    tokens: int
    seconds: float
    train_loss: float | None
    validation_loss: float | None
    curve: list[CurvePoint] = field(default_factory=list)


def train(
    module: nn.Module,
    batches: Batches,
    loss: Loss,
    settings: TrainingSettings,
    *,
    folder: Path | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TrainingResult:
    """Train `module` in place, from the checkpoint in `folder` when there is one.

    Ctrl-C and SIGTERM stop after the step in hand, with a checkpoint; a second one stops at once.

    Args:
        module: its parameters that require gradients are trained; left on `settings.device`, in its mode before.
        batches: position -> batch. Position counts batches: step * accumulate and on.
        loss: (module, batch) -> scalar tensor. Called under autocast when precision is bf16.
        settings: how.
        folder: for the checkpoint and `learning_curve.jsonl`; None keeps nothing.
        validate: measures the module, in eval mode without gradients; see `mean_loss`.
        progress: called after each step.

    Raises:
        TrainingError: loss or gradient are not finite, or nothing is to be trained.
        InputError: no such device here.
        CheckpointError: the checkpoint is damaged or belongs to another model, data or settings.
        OutputError: the folder can not be written.
    """
    was_training = module.training
    check_device(settings.device)
    module.to(settings.device).train()
    with _threads(settings.threads), _own_random(settings.device), _stop_signals() as stop:
        torch.manual_seed(settings.seed)
        run = _Run(module, batches, loss, settings, folder, validate)
        run.resume()
        result = run.until_done(stop, progress)
    module.train(was_training)
    return result


def next_token_loss(module: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token given those before it. batch: (batch, time + 1) int64."""
    logits = module(batch[:, :-1])  # (batch, time, vocab)
    return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def mean_loss(loss: Loss, batches: Sequence[Any], settings: TrainingSettings) -> Callable[[nn.Module], float]:
    """A `validate` function for `train`: the mean of `loss` over fixed batches, in the run's precision."""

    def validate(module: nn.Module) -> float:
        with _autocast(settings):
            return statistics.fmean(float(loss(module, _to_device(batch, settings.device))) for batch in batches)

    return validate


def seconds_per_step(
    module: nn.Module, batches: Batches, loss: Loss, settings: TrainingSettings, probes: int = 4
) -> float:
    """Median time of a step, measured on a copy of `module`: to choose `steps` for a given time."""
    moments: list[float] = []
    short = settings.model_copy(update={"steps": probes + 1, "time_limit_s": None})
    train(copy.deepcopy(module), batches, loss, short, progress=lambda told: moments.append(told.seconds))
    return statistics.median(after - before for before, after in itertools.pairwise(moments))


class _Run:
    """A training under way: what changes from step to step, and how it is kept."""

    def __init__(
        self,
        module: nn.Module,
        batches: Batches,
        loss: Loss,
        settings: TrainingSettings,
        folder: Path | None,
        validate: Callable[[nn.Module], float] | None,
    ) -> None:
        self.module, self.batches, self.loss, self.settings = module, batches, loss, settings
        self.folder, self.validate = folder, validate
        self.optimizers = make_optimizers(module, settings)
        self.parameters = [p for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]]
        self.step = 0
        self.losses: list[float] = []  # since the last point of the curve
        self.curve: list[CurvePoint] = []
        self.seconds_before = 0.0
        self.steps_before = 0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    @property
    def tokens(self) -> int:
        return self.step * self.settings.accumulate * self.settings.batch_size * self.settings.context

    def until_done(self, stop: threading.Event, progress: Callable[[Progress], None] | None) -> TrainingResult:
        settings = self.settings
        if self.step == 0 and self.validate is not None:
            self._add_point(self._validation_loss())
        finish: Finish = "steps"
        saved_step = self.step if self.steps_before else -1
        while self.step < settings.steps:
            loss = self._train_step()
            last = self.step == settings.steps
            if last or _due(self.step, settings.eval_every):
                self._add_point(self._validation_loss())
            elif _due(self.step, settings.log_every):
                self._add_point(None)
            if progress is not None:
                progress(self._progress(loss))
            out_of_time = settings.time_limit_s is not None and self._spent() >= settings.time_limit_s
            halt = not last and (stop.is_set() or out_of_time)
            if last or halt or _due(self.step, settings.checkpoint_every):
                self._save()
                saved_step = self.step
            if halt:
                finish = "interrupted" if stop.is_set() else "time"
                break
        assert self.folder is None or saved_step == self.step
        return self._result(finish)

    def resume(self) -> None:
        facts = read_facts(self.folder) if self.folder is not None else None
        if facts is None or self.folder is None:
            if self.folder is not None:
                write_curve(self.folder, [])
            return
        self._check_same(facts)
        restore_state(self.folder, self.module, self.optimizers)
        self.step = self.steps_before = facts["step"]
        self.losses, self.seconds_before = facts["losses"], facts["seconds"]
        self.curve = [point for point in read_curve(self.folder) if point.step <= self.step]
        write_curve(self.folder, self.curve)
        self.started = time.monotonic()

    def _train_step(self) -> float:
        settings = self.settings
        rate = learning_rate_at(settings, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in range(settings.accumulate):
            batch = _to_device(self.batches(self.step * settings.accumulate + part), settings.device)
            with _autocast(settings):
                loss = self.loss(self.module, batch) / settings.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.gradient_clip or math.inf)
        if not math.isfinite(total) or not math.isfinite(float(norm)):
            raise self._diverged(total, float(norm), rate)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.losses.append(total)
        return total

    def _diverged(self, loss: float, norm: float, rate: float) -> TrainingError:
        kept = ""
        if self.folder is not None and (facts := read_facts(self.folder)) is not None:
            kept = f" The checkpoint of step {facts['step']} in '{self.folder}' is untouched."
        return TrainingError(
            f"Step {self.step + 1} of {self.settings.steps} has loss {loss} and gradient norm {norm} at learning rate "
            f"{rate:.2g}, precision {self.settings.precision}; both must be finite.{kept} Lower the learning rate, "
            "lengthen the warm-up, clip gradients lower, or use precision f32, and look for bad values in the data."
        )

    def _validation_loss(self) -> float | None:
        if self.validate is None:
            return None
        self.module.eval()
        with torch.no_grad(), _own_random(self.settings.device):
            value = self.validate(self.module)
        self.module.train()
        return value

    def _add_point(self, validation_loss: float | None) -> None:
        point = CurvePoint(
            step=self.step, seconds=round(self.seconds, 3), tokens=self.tokens,
            train_loss=statistics.fmean(self.losses) if self.losses else None, validation_loss=validation_loss,
            learning_rate=learning_rate_at(self.settings, max(0, self.step - 1)),
        )  # fmt: skip
        self.losses = []
        self.curve.append(point)
        if self.folder is not None:
            append_point(self.folder, point)

    def _save(self) -> None:
        if self.folder is not None:
            save_state(self.folder, self.module, self.optimizers, {
                "step": self.step, "position": self.step * self.settings.accumulate, "seconds": self.seconds,
                "losses": self.losses, "data": _identity(self.batches),
                "settings": self.settings.model_dump(mode="json"),
            })  # fmt: skip

    def _check_same(self, facts: dict[str, Any]) -> None:
        mine = {"data": _identity(self.batches), **self.settings.model_dump(mode="json")}
        theirs = {"data": facts["data"], **facts["settings"]}
        other = [key for key in mine if key not in FREE_ON_RESUME and mine[key] != theirs.get(key)]
        if other:
            changes = ", ".join(f"{key} {theirs.get(key)} -> {mine[key]}" for key in other)
            raise CheckpointError(
                f"The training in '{self.folder}' (step {facts['step']}) was begun with other settings: {changes}. "
                "Resume with the same ones, or use another folder."
            )

    def _spent(self) -> float:
        return time.monotonic() - self.started

    def _progress(self, loss: float) -> Progress:
        settings = self.settings
        pace = self._spent() / (self.step - self.steps_before)
        left = pace * (settings.steps - self.step)
        if settings.time_limit_s is not None:
            left = min(left, max(0.0, settings.time_limit_s - self._spent()))
        rate = learning_rate_at(settings, self.step - 1)
        return Progress(self.step, settings.steps, self.tokens, self.seconds, left, loss, rate)

    def _result(self, finish: Finish) -> TrainingResult:
        trained = [point.train_loss for point in self.curve if point.train_loss is not None]
        validated = [point.validation_loss for point in self.curve if point.validation_loss is not None]
        return TrainingResult(
            finish, self.step, self.tokens, self.seconds,
            trained[-1] if trained else None, validated[-1] if validated else None, self.curve,
        )  # fmt: skip


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _identity(batches: Batches) -> str:
    return str(getattr(batches, "identity", ""))


def _autocast(settings: TrainingSettings) -> torch.autocast:
    kind = torch.device(settings.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=settings.precision == "bf16")


def _to_device(batch: Any, device: str) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch


def _own_random(device: str) -> AbstractContextManager[None]:
    """What is drawn inside leaves the generators outside as they were."""
    place = torch.device(device)
    cuda = [place.index or 0] if place.type == "cuda" else []
    context: AbstractContextManager[None] = torch.random.fork_rng(devices=cuda)
    return context


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; handlers as before afterwards, and after the first."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, ask_to_stop)
    try:
        yield stop
    finally:
        restore()
