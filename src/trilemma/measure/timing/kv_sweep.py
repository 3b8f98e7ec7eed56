"""Recompute the history, or cache keys and values? Time of one decode step and memory, by cache policy and depth.

A step at depth n appends the n-th token and asks for its logits: with a cache that is one token's work
over n - 1 stored positions, without one ('none') the whole sequence is computed again. The history is
filled once and cut back before each timed step, so every sample is exactly at its depth. When asked for,
the prefill of the whole history up to each depth is timed too. At each depth the policies are interleaved.
Steps that would take too long are left out and say so; nothing is extrapolated into a measurement. Left
out: quality, which `eval --kv` measures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np

from trilemma.core.errors import InputError, UnknownNameError
from trilemma.core.measurement import Measurement
from trilemma.core.results import BenchReport, BenchRow
from trilemma.measure.bench import BenchCandidate, bench_report, bench_row, candidates_of
from trilemma.measure.memory.held import memory_measurements
from trilemma.measure.memory.kv_memory import longest_context, memory_sentence
from trilemma.measure.stats import Interval, paired_ratio
from trilemma.measure.timing.crossover import Crossing, crossover
from trilemma.measure.timing.noise import ReferenceLoop
from trilemma.measure.timing.settle import Progress
from trilemma.measure.timing.speed import timed_measurement
from trilemma.model.cost import prompt_macs
from trilemma.runtime import open_engine
from trilemma.runtime.batch import batch_engine
from trilemma.runtime.engine import EngineOptions, KvCache, settle
from trilemma.runtime.native import NativeEngine, SequenceBatch, Step

SWEEP = "kv"
POINT_TIME_S = 20.0  # what one point (policy and depth) may take unless the user says otherwise
STEPS_S = 0.02  # a repetition lasts at least this long where steps are short
MOST_STEPS = 32


@dataclass
class _Policy:
    """One model under one cache policy: its sequence and the seconds of its steps by depth."""

    candidate: BenchCandidate
    kv: str
    engine: NativeEngine
    room: SequenceBatch
    sequence: int
    prompt: np.ndarray
    samples: dict[int, list[float]] = field(default_factory=dict)
    prefills: dict[int, list[float]] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    last: tuple[int, float] | None = None  # depth and seconds of the last step without a cache

    def fill(self, length: int) -> None:
        """Bring the history to `length` tokens."""
        here = self.room.length(self.sequence)
        if here < length:
            self.room.forward([Step(self.sequence, self.prompt[here:length], "none")])
        else:
            self.room.truncate(self.sequence, length)

    def step_s(self, depth: int) -> float:
        """Seconds of one step whose token is the depth-th."""
        self.room.truncate(self.sequence, depth - 1)
        began = time.perf_counter()
        self.room.forward([Step(self.sequence, self.prompt[depth - 1 : depth])])
        return time.perf_counter() - began

    def prefill_s(self, depth: int) -> float:
        """Seconds of computing all `depth` tokens at once and the logits of the last."""
        self.room.truncate(self.sequence, 0)
        began = time.perf_counter()
        self.room.forward([Step(self.sequence, self.prompt[:depth])])
        return time.perf_counter() - began


def kv_sweep(
    models: str | Path | BenchCandidate | Sequence[str | Path | BenchCandidate],
    *,
    policies: Sequence[str] = ("none", "bf16", "int8"),
    contexts: Sequence[int] = (32, 64, 128, 256, 512),
    runtime: str = "native",
    options: EngineOptions | Sequence[EngineOptions] | None = None,
    repetitions: int = 7,
    point_time_s: float = POINT_TIME_S,
    memory_bytes: float | None = None,
    with_prefill: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> BenchReport:
    """Time of a decode step and memory of the engine, for each cache policy at each depth.

    Args:
        models: as for `bench`.
        policies: of 'none', 'f32', 'bf16', 'int8'.
        contexts: depths in tokens, the timed one included.
        repetitions: interleaved over the policies at each depth.
        point_time_s: a point whose repetitions would take longer gets fewer of them; one whose single step
            would take longer is skipped, with the estimate in its reason. Filling the history is not counted.
        memory_bytes: a memory limit; a note says how many positions each policy holds within it.
        with_prefill: also time the prefill of a prompt as long as each depth.

    Returns:
        A BenchReport with a row for each model, policy and depth ('int8 at 512'): tpot_s, engine_memory_bytes
        (its conditions hold kv_bytes), kv_bytes_per_token, and with prefill also ttft_s and prefill_tokens_per_s.
        The notes say where the lines cross.

    Raises:
        InputError: a depth outside 1..the model's context, an unknown policy, an engine without sequences.
    """
    depths, chosen = _checked(contexts), _distinct(policies)
    variants = list(options) if isinstance(options, Sequence) else [options or EngineOptions()]
    candidates = candidates_of(models, variants)
    for item in candidates:
        if depths[-1] > item.model.config.max_context:
            raise InputError(
                f"A context of {depths[-1]} is longer than the {item.model.config.max_context} of '{item.name}'. "
                "Ask for shorter ones with --context."
            )
    rows: list[BenchRow] = []
    notes: list[str] = []
    total = len(candidates) * len(depths)
    for index, item in enumerate(candidates):
        with ExitStack() as stack:
            held = [_open(item, kv, depths[-1], runtime, seed, stack) for kv in chosen]
            loop = stack.enter_context(ReferenceLoop(held[0].engine.threads))
            for turn, depth in enumerate(depths):
                if progress is not None:
                    progress(index * len(depths) + turn, total, f"{item.name} {item.form}: {depth} positions")
                _measure(held, depth, repetitions, point_time_s, with_prefill)
                loop.probe()
            rows += [_row(one, depth, loop) for one in held for depth in depths]
            notes += [f"{item.name} {item.form}: {line.sentence('positions')}" for line in _crossings(held, depths)]
            if memory_bytes is not None:
                longest = {_label(one.kv): longest_context(one.engine, memory_bytes) for one in held}
                words = memory_sentence(longest, memory_bytes, item.model.config.max_context)
                notes.append(f"{item.name} {item.form}: {words}")
            isa, threads = held[0].engine.isa, held[0].engine.threads
    return bench_report(rows, notes, isa=isa, threads=threads, seed=seed)


def _checked(contexts: Sequence[int]) -> list[int]:
    if not contexts:
        raise InputError("There are no depths to measure. Give some, such as --context 32,64,128.")
    bad = [depth for depth in contexts if depth < 1]
    if bad:
        raise InputError(f"A context of {bad[0]} is not possible; give numbers of tokens from 1 on.")
    return sorted(set(contexts))


def _distinct(policies: Sequence[str]) -> list[str]:
    known = get_args(KvCache)
    if not policies:
        raise InputError(f"There are no cache policies to measure. Give some of {', '.join(known)}.")
    for policy in policies:
        if policy not in known:
            raise UnknownNameError("KV cache", policy, known)
    return list(dict.fromkeys(policies))


def _open(item: BenchCandidate, kv: str, longest: int, runtime: str, seed: int, stack: ExitStack) -> _Policy:
    # The engine's own context is kept at one position: the sequence below has the room.
    options = item.options.model_copy(update={"kv_cache": kv, "max_context": 1})
    opened = open_engine(item.model, runtime=runtime, options=options)
    stack.callback(opened.close)
    settle(opened)
    engine = batch_engine(opened)
    room = engine.open_sequences(1, max_context=longest)
    prompt = np.random.default_rng(seed).integers(0, item.model.config.vocab_size, longest).astype(np.int32)
    return _Policy(item, kv, engine, room, room.create(), prompt)


def _measure(held: Sequence[_Policy], depth: int, repetitions: int, point_time_s: float, with_prefill: bool) -> None:
    """All policies at one depth, interleaved; who goes first rotates."""
    plans: dict[int, tuple[int, int]] = {}  # policy -> repetitions, steps in each
    for index, one in enumerate(held):
        expected = _expected_s(one, depth)
        if expected > point_time_s:
            one.skipped[depth] = (
                f"skipped: would take about {expected:.0f} s a token, more than the {point_time_s:.0f} s of a point"
            )
            continue
        one.fill(depth - 1)
        one.step_s(depth)  # warm-up, discarded
        seconds = one.step_s(depth)
        if one.kv == "none":
            one.last = (depth, seconds)
        steps = int(min(max(STEPS_S / seconds, 1), MOST_STEPS))
        plans[index] = (max(1, min(repetitions, int(point_time_s / (steps * seconds)))), steps)
    for turn in range(max((times for times, _ in plans.values()), default=0)):
        order = list(plans)
        first = turn % len(order)
        for index in order[first:] + order[:first]:
            times, steps = plans[index]
            if turn < times:
                found = [held[index].step_s(depth) for _ in range(steps)]
                held[index].samples.setdefault(depth, []).append(float(np.median(found)))
    if with_prefill:
        _measure_prefill([held[index] for index in plans], depth, repetitions, point_time_s)


def _measure_prefill(held: Sequence[_Policy], depth: int, repetitions: int, point_time_s: float) -> None:
    """All policies fill this depth in turn, as often as the time of a point allows, but once."""
    for one in held:
        one.prefill_s(depth)  # warm-up, discarded
    began = time.perf_counter()
    for turn in range(repetitions):
        first = turn % max(1, len(held))
        for one in [*held[first:], *held[:first]]:
            one.prefills.setdefault(depth, []).append(one.prefill_s(depth))
        if time.perf_counter() - began > point_time_s * len(held):
            break


def _expected_s(one: _Policy, depth: int) -> float:
    """Seconds of a step, from the last one in proportion to the arithmetic; 0 where cached or unknown."""
    if one.last is None:
        return 0.0
    before, seconds = one.last
    config = one.candidate.model.config
    return seconds * prompt_macs(config, depth) / prompt_macs(config, before)


def _row(one: _Policy, depth: int, loop: ReferenceLoop) -> BenchRow:
    conditions: dict[str, str | int | float] = {
        "sweep": SWEEP, "form": one.candidate.form,
        "context": depth, "kv_cache": one.kv, "threads": one.engine.threads, "isa": one.engine.isa,
        "batch": 1, "drift": round(loop.drift, 4),
    }  # fmt: skip
    with_room = one.engine.open_sequences(1, max_context=depth)
    found = memory_measurements(one.engine, with_room.memory(), conditions)
    samples = one.samples.get(depth)
    if samples is None:
        found["tpot_s"] = Measurement.unavailable("tpot_s", one.skipped[depth])
    else:
        method = f"median of {len(samples)} steps at this depth, policies interleaved; 95% interval of the median"
        if loop.reason:
            method += f"; noisy: {loop.reason}"
        found["tpot_s"] = timed_measurement("tpot_s", samples, method, loop.noisy, conditions)
    if depth in one.prefills:
        seconds = one.prefills[depth]
        method = f"median of {len(seconds)} prefills of this depth, policies interleaved; 95% interval of the median"
        rates = [depth / each for each in seconds]
        stated = {**conditions, "prompt_tokens": depth}
        found["ttft_s"] = timed_measurement("ttft_s", seconds, method, loop.noisy, stated)
        found["prefill_tokens_per_s"] = timed_measurement("prefill_tokens_per_s", rates, method, loop.noisy, stated)
    return bench_row(one.candidate, f"{one.candidate.form} kv-{one.kv} at {depth}", found)


def _crossings(held: Sequence[_Policy], depths: Sequence[int]) -> list[Crossing]:
    """Each policy against the one before it in the list, at the depths that both were measured at."""
    found = []
    for a, b in pairwise(held):
        shared = [depth for depth in depths if depth in a.samples and depth in b.samples]
        if shared:
            ratios = [_ratio(a.samples[depth], b.samples[depth]) for depth in shared]
            found.append(crossover(_label(a.kv), _label(b.kv), shared, ratios))
    return found


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    both = min(len(ours), len(theirs))  # repetitions that were side by side
    return paired_ratio(theirs[:both], ours[:both])


def _label(kv: str) -> str:
    return "recompute" if kv == "none" else f"cache {kv}"


__all__ = ["kv_sweep"]
