"""Time to first token, time per output token and the rates that follow.

Candidates are interleaved (A B A B), so that drift hits all of them; the first round is discarded. A repetition
lasts at least 50 ms a candidate: where a request is shorter, it is several rounds of one request each. Rounds in
which the machine was disturbed are set aside for all candidates alike (`quiet.py`), kept in the record and
counted; a sample is the median of a repetition's quiet rounds. A fixed loop beside every repetition and the
kernel's account mark a run noisy when the machine moved or others used it. Prompts are random tokens, the same
for all candidates, and generation ignores the end of text, so that every repetition does the same work.
Left out: several requests at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import EngineError, InputError
from trilemma.core.measurement import Measurement
from trilemma.measure.stats import Interval, median_interval, paired_ratio, quantile_interval
from trilemma.measure.timing.noise import ReferenceLoop
from trilemma.measure.timing.quiet import Sifted, by_repetition, sift
from trilemma.measure.timing.settle import Progress, repeat_for
from trilemma.runtime.engine import Engine, SamplingSettings, settle

REPETITION_S = 0.05  # of each candidate
MOST_ROUNDS = 64  # in a repetition
SPEED_METRICS = ("ttft_s", "tpot_s", "itl_s", "itl_p99_s", "prefill_tokens_per_s", "decode_tokens_per_s")
_QUANTITIES = ("ttft_s", "tpot_s")


@dataclass
class SpeedSamples:
    """One candidate's raw times in seconds, one entry a round; `gaps_s` has a row a round."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    gaps_s: list[NDArray[np.float64]] = field(default_factory=list)


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
        self._repetition: list[int] = []  # of each round
        self._rounds = 1
        self._turn = 0

    def warm_up(self) -> float:
        """One discarded round (two where requests are short); seconds that it took."""
        began = time.perf_counter()
        request_s = 0.0
        for engine in self.engines.values():
            settle(engine)
            last = self._times(engine)[-1]
            request_s += self._times(engine)[-1] if last < REPETITION_S else last
        self._rounds = int(np.clip(np.ceil(REPETITION_S * len(self.engines) / request_s), 1, MOST_ROUNDS))
        self.loop.probe()
        return time.perf_counter() - began

    def repeat(self, times: int = 1) -> None:
        """Measure each engine `times` more repetitions, interleaved; who goes first rotates."""
        names = list(self.engines)
        for _ in range(times):
            number = self._repetition[-1] + 1 if self._repetition else 0
            for _ in range(self._rounds):
                first = self._turn % len(names)
                stamps = {name: self._times(self.engines[name]) for name in names[first:] + names[:first]}
                self._keep(stamps)  # of whole rounds alone, should Ctrl-C come
                self._repetition.append(number)
                self._turn += 1
            self.loop.probe()

    def results(self) -> dict[str, dict[str, Measurement]]:
        """Medians with 95% intervals and raw samples, per engine and metric."""
        sifted = {quantity: self._sift(quantity) for quantity in _QUANTITIES}
        machine = self.loop.reason
        return {name: self._measurements(name, sifted, machine) for name in self.engines}

    @property
    def reason(self) -> str | None:
        """Why the run is noisy, or None: what the machine shows, else what the measured work itself shows."""
        found = (self.loop.reason, self._sift("tpot_s").reason, self._sift("ttft_s").reason)
        return next((reason for reason in found if reason), None)

    @property
    def repetitions(self) -> int:
        """How many were made."""
        return len(set(self._repetition))

    @property
    def share_aside(self) -> float:
        """Share of the rounds that tpot_s is not made of."""
        return self._sift("tpot_s").share_aside

    @property
    def half_width(self) -> float:
        """Relative half width of the widest interval of any candidate's tpot_s; infinite without one."""
        kept = self._sift("tpot_s").kept
        intervals = [
            median_interval(by_repetition(own.tpot_s, self._repetition, kept)) for own in self.samples.values()
        ]
        return max(
            float("inf") if found.low is None or found.high is None else (found.high - found.low) / 2 / found.value
            for found in intervals
        )

    def relative(self, baseline: str, candidate: str, metric: str = "tpot_s") -> Interval:
        """Candidate over baseline, paired by repetition. `metric` is ttft_s or tpot_s."""
        kept = self._sift(metric).kept
        base, other = (
            by_repetition(getattr(self.samples[name], metric), self._repetition, kept) for name in (baseline, candidate)
        )
        return paired_ratio(base, other)

    def close(self) -> None:
        self.loop.close()

    def _keep(self, stamps: Mapping[str, list[float]]) -> None:
        for name, times in stamps.items():
            own = self.samples[name]
            own.ttft_s.append(times[0])
            own.tpot_s.append((times[-1] - times[0]) / (len(times) - 1))
            own.gaps_s.append(np.diff(times))

    def _sift(self, quantity: str) -> Sifted:
        return sift([getattr(own, quantity) for own in self.samples.values()])

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

    def _measurements(self, name: str, sifted: Mapping[str, Sifted], machine: str | None) -> dict[str, Measurement]:
        own, engine = self.samples[name], self.engines[name]
        conditions: dict[str, str | int | float] = {
            "prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens, "threads": engine.threads,
            "isa": engine.isa, "kv_cache": engine.kv_cache, "batch": 1, "drift": round(self.loop.drift, 4),
        }  # fmt: skip
        share = self.loop.foreign_share
        if share is not None:
            conditions["foreign_cpu_share"] = round(share, 4)
        found: dict[str, Measurement] = {}
        for quantity, rate, tokens in (
            ("ttft_s", "prefill_tokens_per_s", self.prompt_tokens), ("tpot_s", "decode_tokens_per_s", 1)
        ):  # fmt: skip
            about = sifted[quantity]
            stated = conditions | round_conditions(self._repetition, about)
            reason = machine or about.reason
            method = _method(self.repetitions, about, reason)
            seconds = np.asarray(getattr(own, quantity))
            samples, aside = by_repetition(seconds, self._repetition, about.kept), seconds[~about.kept]
            for metric, values, others in (
                (quantity, samples, aside), (rate, [tokens / one for one in samples], tokens / aside)
            ):  # fmt: skip
                found[metric] = timed_measurement(
                    metric, values, method, bool(reason), stated, set_aside=others.tolist()
                )
        found |= self._gaps(own, sifted["tpot_s"], found["tpot_s"])
        return {metric: found[metric] for metric in SPEED_METRICS}

    def _gaps(self, own: SpeedSamples, about: Sifted, tpot: Measurement) -> dict[str, Measurement]:
        rows = np.asarray(own.gaps_s)  # (rounds, gaps)
        kept = rows[about.kept]
        pooled = kept.ravel()
        owners = np.repeat(np.asarray(self._repetition)[about.kept], kept.shape[1])
        gaps, slowest = median_interval(pooled), quantile_interval(pooled, owners, 0.99)
        conditions = tpot.conditions | {f"p{q}_itl_s": float(np.percentile(pooled, q)) for q in (50, 90, 99)}
        return {
            "itl_s": Measurement.of(
                "itl_s", gaps.value, method="median of every gap of the quiet rounds, pooled", ci95=gaps.ci95,
                n=pooled.size, samples=tuple(pooled.tolist()), set_aside=tuple(rows[~about.kept].ravel().tolist()),
                noisy=tpot.noisy, conditions=conditions,
            ),
            "itl_p99_s": Measurement.of(
                "itl_p99_s", slowest.value, method="99% quantile of the same gaps; interval over repetitions",
                ci95=slowest.ci95, n=pooled.size, noisy=tpot.noisy, conditions=conditions,
            ),
        }  # fmt: skip


def round_conditions(repetition: Sequence[int] | range, about: Sifted) -> dict[str, str | int | float]:
    """What a record states of the rounds behind a figure."""
    return {
        "repetitions": len(set(repetition)), "rounds": len(repetition), "set_aside_share": round(about.share_aside, 4),
    }  # fmt: skip


def _method(repetitions: int, about: Sifted, reason: str | None) -> str:
    text = f"median of {repetitions} interleaved repetitions after a warm-up; 95% interval of the median"
    if not about.kept.all():
        text += f"; {about.share_aside:.0%} of the rounds set aside, slower than the quiet level by more than 5%"
    return text + (f"; noisy: {reason}" if reason else "")


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
    try:
        run.warm_up()
        repeat_for([run], repetitions, time_limit_s=time_limit_s, progress=progress)
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
    metric: str,
    samples: Sequence[float],
    method: str,
    noisy: bool,
    conditions: dict[str, str | int | float],
    *,
    set_aside: Sequence[float] = (),
) -> Measurement:
    """The median of repetitions with its interval and the samples themselves, and those set aside."""
    found = median_interval(samples)
    return Measurement.of(
        metric, found.value, method=method, ci95=found.ci95, n=len(samples), samples=tuple(samples),
        set_aside=tuple(set_aside), window_s=None, noisy=noisy, conditions=conditions,
    )  # fmt: skip
