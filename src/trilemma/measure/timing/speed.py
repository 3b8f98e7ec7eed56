"""Time to first token, time per output token and the rates that follow.

Candidates are interleaved (A B A B), so that drift hits all of them; the first round is discarded;
a fixed loop before, between and after marks a run noisy when the machine moved. Prompts are random
tokens, the same for all candidates, and generation ignores the end of text, so that every
repetition does the same work. Left out: several requests at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trilemma.core.errors import EngineError, InputError
from trilemma.core.measurement import Measurement
from trilemma.measure.stats import Interval, median_interval, paired_ratio
from trilemma.measure.timing.noise import ReferenceLoop
from trilemma.runtime.engine import Engine, SamplingSettings

Progress = Callable[[int, int, str], None]

LEAST_REPETITIONS = 3
SPEED_METRICS = ("ttft_s", "tpot_s", "itl_s", "prefill_tokens_per_s", "decode_tokens_per_s")


@dataclass
class SpeedSamples:
    """One candidate's raw times in seconds, one entry a repetition; gaps of all repetitions pooled."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


class SpeedRun:
    """A run that can be continued until its intervals are tight enough: `repeat`, look, `repeat`.

    Args:
        engines: open engines by name; all measured on one prompt.
        prompt_tokens, output_tokens: lengths of each request; at least 1 and 2.
        seed: of the random prompt.

    Raises:
        InputError: lengths that an engine's context does not hold.
    """

    def __init__(self, engines: Mapping[str, Engine], *, prompt_tokens: int, output_tokens: int, seed: int = 0) -> None:
        if prompt_tokens < 1 or output_tokens < 2:
            raise InputError(
                f"Timing needs at least 1 prompt token and 2 output tokens, not {prompt_tokens} and {output_tokens}."
            )
        for name, engine in engines.items():
            if prompt_tokens + output_tokens > engine.max_context:
                raise InputError(
                    f"{prompt_tokens} prompt and {output_tokens} output tokens do not fit the context of '{name}' "
                    f"({engine.max_context}). Ask for fewer."
                )
        self.engines = dict(engines)
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        vocab = min(engine.config.vocab_size for engine in engines.values())
        self._prompt = [int(token) for token in np.random.default_rng(seed).integers(0, vocab, prompt_tokens)]
        self._settings = SamplingSettings(max_tokens=output_tokens, ignore_eos=True)
        self.samples = {name: SpeedSamples() for name in engines}
        self.loop = ReferenceLoop(max(engine.threads for engine in engines.values()))
        self._turn = 0

    def warm_up(self) -> float:
        """One discarded round; seconds that it took."""
        began = time.perf_counter()
        for engine in self.engines.values():
            self._times(engine)
        self.loop.probe()
        return time.perf_counter() - began

    def repeat(self, times: int = 1) -> None:
        """Measure each engine `times` more, interleaved; who goes first rotates."""
        names = list(self.engines)
        for _ in range(times):
            first = self._turn % len(names)
            for name in names[first:] + names[:first]:
                stamps = self._times(self.engines[name])
                kept = self.samples[name]
                kept.ttft_s.append(stamps[0])
                kept.tpot_s.append((stamps[-1] - stamps[0]) / (len(stamps) - 1))
                kept.gaps_s.extend(float(gap) for gap in np.diff(stamps))
            self.loop.probe()
            self._turn += 1

    def results(self) -> dict[str, dict[str, Measurement]]:
        """Medians with 95% intervals and raw samples, per engine and metric."""
        return {name: self._measurements(name) for name in self.engines}

    def relative(self, baseline: str, candidate: str, metric: str = "tpot_s") -> Interval:
        """Candidate over baseline, paired by repetition. `metric` is ttft_s or tpot_s."""
        return paired_ratio(getattr(self.samples[baseline], metric), getattr(self.samples[candidate], metric))

    def close(self) -> None:
        self.loop.close()

    def _times(self, engine: Engine) -> list[float]:
        generation = engine.generate(self._prompt, self._settings)
        stamps = generation.token_times_s
        if len(stamps) != self.output_tokens or len(generation.tokens) != self.output_tokens:
            raise EngineError(
                f"The engine '{engine.name}' gave {len(generation.tokens)} tokens with {len(stamps)} times instead of "
                f"{self.output_tokens} ({generation.finish_reason}); it can not be timed."
            )
        if not np.all(np.isfinite(stamps)) or stamps[0] <= 0 or stamps[-1] <= stamps[0]:
            raise EngineError(f"The engine '{engine.name}' gave times that do not increase; it can not be timed.")
        return stamps

    def _measurements(self, name: str) -> dict[str, Measurement]:
        kept, engine = self.samples[name], self.engines[name]
        conditions: dict[str, str | int | float] = {
            "prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens, "threads": engine.threads,
            "isa": engine.isa, "kv_cache": engine.kv_cache, "batch": 1, "drift": round(self.loop.drift, 4),
        }  # fmt: skip
        share = self.loop.foreign_share
        if share is not None:
            conditions["foreign_cpu_share"] = round(share, 4)
        reason = self.loop.reason
        method = f"median of {len(kept.tpot_s)} interleaved repetitions after a warm-up; 95% interval of the median"
        if reason:
            method += f"; noisy: {reason}"
        series = {
            "ttft_s": kept.ttft_s,
            "tpot_s": kept.tpot_s,
            "prefill_tokens_per_s": [self.prompt_tokens / seconds for seconds in kept.ttft_s],
            "decode_tokens_per_s": [1 / seconds for seconds in kept.tpot_s],
        }
        found = {
            metric: timed_measurement(metric, samples, method, bool(reason), conditions)
            for metric, samples in series.items()
        }
        gaps = median_interval(kept.gaps_s)
        spread = {f"p{q}_itl_s": float(np.percentile(kept.gaps_s, q)) for q in (50, 90, 99)}
        found["itl_s"] = Measurement.of(
            "itl_s", gaps.value, method="median of every gap, pooled", ci95=gaps.ci95, n=len(kept.gaps_s),
            samples=tuple(kept.gaps_s), noisy=bool(reason), conditions={**conditions, **spread},
        )  # fmt: skip
        return {metric: found[metric] for metric in SPEED_METRICS}


def measure_speed(
    engines: Mapping[str, Engine],
    *,
    prompt_tokens: int,
    output_tokens: int,
    repetitions: int = 5,
    seed: int = 0,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Measurement]]:
    """Measure all engines interleaved: {name: {metric: Measurement}} for `SPEED_METRICS`.

    Args:
        engines: open engines by name.
        prompt_tokens, output_tokens: lengths of each request.
        repetitions: after the discarded first round.
        seed: of the random prompt.
        time_limit_s: stop after it, but not before three repetitions.
        progress: called with (done, total, what).

    Raises:
        InputError: lengths that do not fit. EngineError: an engine that stops early.
    """
    run = SpeedRun(engines, prompt_tokens=prompt_tokens, output_tokens=output_tokens, seed=seed)
    began = time.perf_counter()
    try:
        run.warm_up()
        for turn in range(max(1, repetitions)):
            spent = time.perf_counter() - began
            if (
                time_limit_s is not None
                and turn >= LEAST_REPETITIONS
                and spent * (turn + 2) / (turn + 1) > time_limit_s
            ):
                break
            run.repeat()
            if progress is not None:
                progress(turn + 1, repetitions, "speed")
        return run.results()
    finally:
        run.close()


RelativeTimes = dict[str, tuple[float, float | None, float | None]]


def relative_times(baseline: Mapping[str, Measurement], candidate: Mapping[str, Measurement]) -> RelativeTimes:
    """ttft_s and tpot_s of a candidate over those of a baseline of the same run, paired: (ratio, low, high)."""
    pairs = {metric: relative(baseline[metric], candidate[metric]) for metric in ("ttft_s", "tpot_s")}
    return {metric: (pair.value, pair.low, pair.high) for metric, pair in pairs.items()}


def relative(baseline: Measurement, candidate: Measurement) -> Interval:
    """Candidate over baseline from their raw samples, paired by repetition.

    Raises:
        InputError: the two were not measured in one interleaved run.
    """
    base, other = _require_samples(baseline), _require_samples(candidate)
    if len(base) != len(other) or baseline.metric != candidate.metric:
        raise InputError(
            f"{baseline.metric} ({len(base)} samples) and {candidate.metric} ({len(other)} samples) can not be paired; "
            "measure both in one run of measure_speed."
        )
    return paired_ratio(base, other)


def _require_samples(measurement: Measurement) -> Sequence[float]:
    if not measurement.samples:
        raise InputError(f"The measurement of {measurement.metric} keeps no samples to pair.")
    return measurement.samples


def timed_measurement(
    metric: str, samples: Sequence[float], method: str, noisy: bool, conditions: dict[str, str | int | float]
) -> Measurement:
    """The median of repetitions with its interval and the samples themselves."""
    found = median_interval(samples)
    return Measurement.of(
        metric, found.value, method=method, ci95=found.ci95, n=len(samples), samples=tuple(samples),
        window_s=None, noisy=noisy, conditions=conditions,
    )  # fmt: skip
