"""Predictions held against requests that were really made: models whose shapes are not in the tables.

Each case is a random model opened in the engine; time per token and to the first token are taken as `bench` takes them,
with the lower quartile that the tables hold too. The errors go into the profile and are printed with every prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trilemma.core.device import Device
from trilemma.core.host_tables import CheckCase
from trilemma.measure.device.small_models import Shape, random_model
from trilemma.measure.device.step_time import Prediction, StepTimes, form_of
from trilemma.measure.device.tries import take_turns, typical
from trilemma.model.model import Activation, Model
from trilemma.runtime.engine import EngineOptions, KvCache, SamplingSettings
from trilemma.runtime.native import NativeEngine

OUTPUT = 12
# Inside layers, embedding and head, input precision: as the schemes f32, bf16, W8A8-g32 and W4A8-g32 leave them.
FORMATS: dict[str, tuple[str, str, Activation]] = {
    "f32": ("f32", "f32", "f32"),
    "bf16": ("bf16", "bf16", "bf16"),
    "W8A8-g32": ("int8-g32", "int8-g32", "int8-g32"),
    "W4A8-g32": ("int4-g32", "int8-g32", "int8-g32"),
}


@dataclass(frozen=True)
class Case:
    """A model, its format and a request."""

    shape: Shape
    format: str
    prompt_tokens: int
    kv: KvCache = "bf16"

    @property
    def name(self) -> str:
        s = self.shape
        return (
            f"{s.layers} x {s.dim}, ffn {s.hidden}, {s.heads}/{s.kv_heads} heads, vocabulary {s.vocab}, {self.format}, "
            f"prompt {self.prompt_tokens}, cache {self.kv}"
        )

    def model(self) -> Model:
        return random_model(self.shape.config(), *FORMATS[self.format], self.kv)


CASES = (
    Case(Shape(6, 320, 864, 5, 5, 64, 6000, 512), "W8A8-g32", 48),
    Case(Shape(8, 512, 1376, 8, 4, 64, 12000, 512), "W4A8-g32", 200),
    Case(Shape(4, 640, 1728, 10, 2, 64, 8000, 512), "f32", 100),
    Case(Shape(10, 448, 1216, 7, 7, 64, 16000, 512), "bf16", 160),
    Case(Shape(12, 768, 2048, 12, 4, 64, 24000, 512), "W4A8-g32", 330, "int8"),
    Case(Shape(10, 896, 2432, 14, 2, 64, 20000, 512), "W8A8-g32", 64),
    Case(Shape(5, 288, 1152, 9, 3, 32, 10000, 1100), "W4A8-g32", 1000),
    Case(Shape(6, 832, 2240, 13, 13, 64, 8000, 512), "bf16", 280),
)


class Running:
    """A case opened in the engine; `once` makes one request."""

    def __init__(self, case: Case, threads: int) -> None:
        self.case = case
        self.engine = NativeEngine(case.model(), EngineOptions(threads=threads, max_context=case.shape.context))
        self._prompt = [
            int(token) for token in np.random.default_rng(0).integers(0, case.shape.vocab, case.prompt_tokens)
        ]
        self._settings = SamplingSettings(max_tokens=OUTPUT, ignore_eos=True)
        self.first_s: list[float] = []
        self.gaps_s: list[float] = []

    def once(self) -> float:
        """One request; returns its seconds."""
        stamps = self.engine.generate(self._prompt, self._settings).token_times_s
        self.first_s.append(stamps[0])
        self.gaps_s.extend(float(gap) for gap in np.diff(stamps))
        return stamps[-1]

    def close(self) -> None:
        self.engine.close()


def check(
    device: Device,
    cases: Sequence[Case] = CASES,
    *,
    threads: int | None = None,
    rounds: int = 6,
    most_s: float = 60.0,
    progress: Callable[[float], None] | None = None,
) -> tuple[CheckCase, ...]:
    """Predicted and measured times of all cases, two rows each.

    Args:
        threads: the profile's most by default.
        rounds, most_s: requests of each case, taking turns, and no round begins after so many seconds.
    """
    times = StepTimes(device, threads)
    noisy = times.tables.noisy is not None
    running = [Running(case, times.threads) for case in cases]
    take_turns({one.case.name: one.once for one in running}, rounds=rounds, most_s=most_s, progress=progress)
    found: list[CheckCase] = []
    for one in running:
        expected = predict_case(times, one.case)
        found.append(_row(one.case, "tpot_s", expected.tpot_s, typical(one.gaps_s, noisy=noisy)))
        found.append(_row(one.case, "ttft_s", expected.ttft_s, typical(one.first_s[1:], noisy=noisy)))
        one.close()
    return tuple(found)


def predict_case(times: StepTimes, case: Case) -> Prediction:
    """What the tables say of a case."""
    return times.predict(form_of(case.model()), case.prompt_tokens, OUTPUT)


def _row(case: Case, quantity: str, predicted_s: float, measured_s: float) -> CheckCase:
    return CheckCase.model_validate(
        {"name": case.name, "quantity": quantity, "predicted_s": predicted_s, "measured_s": measured_s}
    )
