"""What an answer costs with a cascade, with the small model alone and with the large one alone: time and energy.

The three answer the same prompts, prompt by prompt in turn, so that drift hits all of them. Energy is read
from a counter where there is one, in a window for each; else it is estimated from the times.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from trilemma.core.measurement import Measurement
from trilemma.formats.artifact import load_any
from trilemma.measure.bench import decode_bytes
from trilemma.measure.energy.model_energy import precision_of
from trilemma.measure.energy.per_token import Work, estimate_energy, measure_energy
from trilemma.measure.energy.sensors import Sensor, SensorGoneError, find_sensors
from trilemma.measure.stats import ratio_interval
from trilemma.measure.timing.noise import ReferenceLoop
from trilemma.model.cost import macs_per_token
from trilemma.model.model import Model
from trilemma.runtime.cascade import CascadeEngine, CascadeGeneration
from trilemma.runtime.engine import Engine, Generation, SamplingSettings, settle

Progress = Callable[[int, int, str], None]
NAMES = ("cascade", "small", "large")


@dataclass(frozen=True)
class Request:
    """A prompt, the text that follows it in its document, and which document that is."""

    document: int
    prompt: list[int]
    text: list[int]


@dataclass(frozen=True)
class AnswerTimes:
    """seconds: who answered -> (prompts,); tokens: the same for output tokens; per prompt also the cascade's
    answers themselves, whether the small model's was kept, and whether it is the large one's token for token."""

    seconds: dict[str, NDArray[np.float64]]
    tokens: dict[str, NDArray[np.int64]]
    answers: list[CascadeGeneration]
    kept: NDArray[np.bool_]
    same: NDArray[np.bool_]
    noisy: str | None

    @property
    def kept_token_share(self) -> float:
        """Share of the cascade's output tokens that the small model wrote."""
        return float(self.tokens["cascade"][self.kept].sum() / max(1, self.tokens["cascade"].sum()))

    def relative(self, requests: Sequence[Request]) -> tuple[float, float | None, float | None]:
        """Seconds of the cascade over those of the large model alone, paired, with an interval over documents."""
        found = ratio_interval(
            *(_by_document(self.seconds[name], requests) for name in ("cascade", "large")), scale="log"
        )
        return found.value, found.low, found.high


def time_answers(
    engine: CascadeEngine, requests: Sequence[Request], settings: SamplingSettings, progress: Progress | None = None
) -> AnswerTimes:
    """Answer every prompt with the cascade, the small and the large model, who goes first rotating."""
    engines: dict[str, Engine] = {"cascade": engine, "small": engine.small, "large": engine.large}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    answers: dict[str, list[Generation]] = {name: [] for name in NAMES}
    with ReferenceLoop(engine.threads) as loop:
        settle(engine)
        for one in engines.values():  # warm-up
            one.generate(requests[0].prompt, settings)
        loop.probe()
        for index, request in enumerate(requests):
            first = index % len(NAMES)
            for name in [*NAMES[first:], *NAMES[:first]]:
                began = time.perf_counter()
                answers[name].append(engines[name].generate(request.prompt, settings))
                seconds[name].append(time.perf_counter() - began)
            if progress is not None:
                progress(index + 1, len(requests), "timing answers")
        loop.probe()
        noisy = loop.reason
    cascade = [done for done in answers["cascade"] if isinstance(done, CascadeGeneration)]
    return AnswerTimes(
        {name: np.array(values) for name, values in seconds.items()},
        {name: np.array([len(done.tokens) for done in found]) for name, found in answers.items()},
        cascade, np.array([done.by == "small" for done in cascade]),
        np.array([ours.tokens == theirs.tokens for ours, theirs in zip(cascade, answers["large"], strict=True)]), noisy,
    )  # fmt: skip


def answer_costs(
    engine: CascadeEngine,
    requests: Sequence[Request],
    settings: SamplingSettings,
    times: AnswerTimes,
    small: Model | str | Path,
    large: Model | str | Path,
) -> dict[str, dict[str, Measurement]]:
    """answer_s and energy_j_per_answer of 'cascade', 'small' and 'large'."""
    found: dict[str, dict[str, Measurement]] = {}
    for name in NAMES:
        mean = ratio_interval(_by_document(times.seconds[name], requests), _by_document(None, requests), scale="log")
        found[name] = {
            "answer_s": Measurement.of(
                "answer_s", mean.value, ci95=mean.ci95, n=len(requests), samples=tuple(times.seconds[name]),
                noisy=times.noisy is not None, method="mean over prompts, interleaved; 95% interval over documents",
                conditions={"output_tokens_mean": float(times.tokens[name].mean()), "threads": engine.threads},
            )
        }  # fmt: skip
    energies = _measured_energy(engine, requests, settings) or _estimated_energy(engine, requests, times, small, large)
    return {name: found[name] | {"energy_j_per_answer": energies[name]} for name in NAMES}


def _measured_energy(
    engine: CascadeEngine, requests: Sequence[Request], settings: SamplingSettings
) -> dict[str, Measurement] | None:
    """One window of whole answers each; None without a counter."""
    sensors = find_sensors()
    if not any(sensor.scope in ("package", "soc", "wall") and not sensor.reason for sensor in sensors):
        return None
    engines: dict[str, Engine] = {"cascade": engine, "small": engine.small, "large": engine.large}
    try:
        return {name: _window(engines[name], requests, settings, sensors) for name in NAMES}
    except SensorGoneError:
        return None


def _window(
    engine: Engine, requests: Sequence[Request], settings: SamplingSettings, sensors: Sequence[Sensor]
) -> Measurement:
    turn = itertools.cycle(requests)

    def run() -> Work:
        engine.generate(next(turn).prompt, settings)
        return Work(prompt_tokens=0, output_tokens=1)  # an answer is the unit

    found = measure_energy(run, sensors)["energy_j_per_output_token"]
    return found.model_copy(
        update={"metric": "energy_j_per_answer", "conditions": {**found.conditions, "answers": len(requests)}}
    )


def _estimated_energy(
    engine: CascadeEngine,
    requests: Sequence[Request],
    times: AnswerTimes,
    small: Model | str | Path,
    large: Model | str | Path,
) -> dict[str, Measurement]:
    """The energy model on mean seconds, bytes and multiplications of an answer."""
    models = {
        "small": small if isinstance(small, Model) else load_any(small),
        "large": large if isinstance(large, Model) else load_any(large),
    }
    prompt = median(len(one.prompt) for one in requests)
    position = int(prompt + median(times.tokens["large"]) // 2)
    steps = {
        "small": float(np.mean([done.small_tokens for done in times.answers])),
        "large": float(np.mean(np.where(times.kept, 0, times.tokens["cascade"]))),
    }
    prompts = {"small": prompt, "large": prompt * float(np.mean(~times.kept))}
    step_bytes = {name: decode_bytes(model, engine.kv_cache, position) for name, model in models.items()}
    step_macs = {name: macs_per_token(model.config, position) for name, model in models.items()}
    reason = "; ".join(f"{sensor.name}: {sensor.reason}" for sensor in find_sensors() if sensor.reason) or "no counter"
    found: dict[str, Measurement] = {}
    for name in NAMES:
        parts = ("small", "large") if name == "cascade" else (name,)
        output = {part: steps[part] if name == "cascade" else float(times.tokens[name].mean()) for part in parts}
        fed = {part: prompts[part] if name == "cascade" else float(prompt) for part in parts}
        estimate = estimate_energy(
            seconds=float(times.seconds[name].mean()), tokens=Work(prompt_tokens=0, output_tokens=1),
            cores=engine.threads, read_bytes=sum(step_bytes[part] * output[part] for part in parts),
            macs=sum(step_macs[part] * (output[part] + fed[part]) for part in parts),
            precision=precision_of(models["large"]), reason=reason,
        )["energy_j_per_output_token"]  # fmt: skip
        found[name] = estimate.model_copy(update={"metric": "energy_j_per_answer"})
    return found


def _by_document(values: NDArray[np.float64] | None, requests: Sequence[Request]) -> NDArray[np.float64]:
    """Sums over each document; None counts the prompts."""
    names, owner = np.unique([one.document for one in requests], return_inverse=True)
    return np.bincount(owner, weights=values, minlength=len(names)).astype(np.float64)
