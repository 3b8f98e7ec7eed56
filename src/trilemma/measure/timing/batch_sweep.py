"""Throughput against latency: the same model with 1, 2, 4, ... sequences in each step, interleaved.

All prompts of a batch are prefilled in one call and all sequences take each step together, so the gap
between two tokens is the same for all of them. Left out: requests that arrive at different times.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trilemma.core.environment import total_memory_bytes
from trilemma.core.errors import EngineError, InputError
from trilemma.core.measurement import Measurement
from trilemma.core.results import BenchReport, BenchRow
from trilemma.measure.bench import BenchCandidate, bench_report, bench_row, candidates_of
from trilemma.measure.memory.held import memory_measurements
from trilemma.measure.stats import paired_ratio
from trilemma.measure.timing.noise import ReferenceLoop
from trilemma.measure.timing.quiet import Sifted, sift
from trilemma.measure.timing.roofline import Ceilings, step_share
from trilemma.measure.timing.settle import Progress
from trilemma.measure.timing.speed import round_conditions, timed_measurement
from trilemma.model.cost import kv_bytes
from trilemma.runtime import open_engine
from trilemma.runtime.batch import batch_engine, generate_batch
from trilemma.runtime.engine import EngineOptions, SamplingSettings, settle
from trilemma.runtime.native import NativeEngine, SequenceBatch

SWEEP = "batch"


@dataclass
class _Batch:
    """One model at one number of sequences, with its raw times, one entry a repetition."""

    candidate: BenchCandidate
    engine: NativeEngine
    room: SequenceBatch
    prompts: list[list[int]]
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    throughput: list[float] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.prompts)

    def run(self, output_tokens: int, *, keep: bool) -> None:
        settings = SamplingSettings(max_tokens=output_tokens, ignore_eos=True)
        found = generate_batch(self.engine, self.prompts, settings, sequences=self.room)
        if any(len(one.tokens) != output_tokens for one in found):
            raise EngineError(
                f"The engine '{self.engine.name}' stopped early; a batch of {self.size} can not be timed."
            )
        if not keep:
            return
        stamps = np.asarray(found[-1].token_times_s)  # the last of each step: then all have their token
        gaps = np.diff(stamps)
        self.ttft_s.append(float(stamps[0]))
        self.tpot_s.append(float(gaps.mean()))
        self.itl_s.append(float(np.median(gaps)))
        self.throughput.append(self.size * output_tokens / float(stamps[-1]))


def batch_sweep(
    models: str | Path | BenchCandidate | Sequence[str | Path | BenchCandidate],
    *,
    batches: Sequence[int] = (1, 2, 4, 8, 16),
    prompt_tokens: int = 128,
    output_tokens: int = 32,
    runtime: str = "native",
    options: EngineOptions | Sequence[EngineOptions] | None = None,
    repetitions: int = 15,
    seed: int = 0,
    progress: Progress | None = None,
) -> BenchReport:
    """Throughput, latency and memory by number of sequences; all models and batches interleaved.

    Args:
        models: as for `bench`.
        batches: numbers of sequences that run together.
        prompt_tokens, output_tokens: of each sequence; prompts are random and differ.
        repetitions: after a discarded round; from ten on, disturbed ones are set aside.

    Returns:
        A BenchReport with a row for each model and batch ('bf16 x8'): throughput_tokens_per_s (all output tokens
        over the time from the request to the last one, prefill included), ttft_s (all prompts prefilled together),
        tpot_s and itl_s (of each sequence), engine_memory_bytes. The conditions of rates and gaps hold
        `roofline_share`, of the nearer of the two ceilings, and `bound_by`, which one that is.

    Raises:
        InputError: a batch below 1, lengths that a model's context does not hold, caches that do not fit in memory,
            an engine that runs one sequence at a time.
    """
    sizes = _checked(batches, prompt_tokens, output_tokens)
    variants = list(options) if isinstance(options, Sequence) else [options or EngineOptions()]
    candidates = candidates_of(models, variants)
    context = prompt_tokens + output_tokens
    for item in candidates:
        _check_room(item, context, sizes)
    with ExitStack() as stack:
        held = [one for item in candidates for one in _open(item, sizes, prompt_tokens, context, runtime, seed, stack)]
        loop = stack.enter_context(ReferenceLoop(held[0].engine.threads))
        for turn in range(repetitions + 1):  # the first round is discarded
            first = turn % len(held)
            for number, one in enumerate(held[first:] + held[:first]):
                one.run(output_tokens, keep=turn > 0)
                if progress is not None:
                    progress(turn * len(held) + number + 1, (repetitions + 1) * len(held), f"batch of {one.size}")
            loop.probe()
        about = sift([one.tpot_s for one in held])
        reason = loop.reason or about.reason
        ceilings = Ceilings()
        rows = [_row(one, prompt_tokens, output_tokens, loop.drift, about, reason, ceilings) for one in held]
        notes = [note for item in candidates for note in _gain([one for one in held if one.candidate is item], about)]
        return bench_report(
            rows, [*notes, *ceilings.notes()], isa=held[0].engine.isa, threads=held[0].engine.threads, seed=seed
        )


def _checked(batches: Sequence[int], prompt_tokens: int, output_tokens: int) -> list[int]:
    if not batches:
        raise InputError("There are no batches to measure. Give some, such as --batch 1,2,4,8.")
    bad = [size for size in batches if size < 1]
    if bad:
        raise InputError(f"A batch of {bad[0]} is not possible; give numbers of sequences from 1 on.")
    if prompt_tokens < 1 or output_tokens < 2:
        raise InputError(
            f"Timing needs at least 1 prompt token and 2 output tokens, not {prompt_tokens} and {output_tokens}."
        )
    return sorted(set(batches))


def _check_room(item: BenchCandidate, context: int, sizes: Sequence[int]) -> None:
    config = item.model.config
    if context > config.max_context:
        raise InputError(
            f"{context} tokens of prompt and output are longer than the {config.max_context} of '{item.name}'. "
            "Ask for fewer with --prompt and --output."
        )
    needed = kv_bytes(config, item.options.kv_cache or item.model.run.kv_cache, context) * sum(sizes)
    there = total_memory_bytes()
    if there and needed > there:
        raise InputError(
            f"Batches of {', '.join(map(str, sizes))} sequences of {context} tokens need {needed / 1e9:.1f} GB of "
            f"cache; this machine has {there / 1e9:.1f} GB. Ask for smaller batches or fewer tokens."
        )


def _open(
    item: BenchCandidate, sizes: Sequence[int], prompt_tokens: int, context: int, runtime: str, seed: int,
    stack: ExitStack,
) -> list[_Batch]:  # fmt: skip
    """One engine (one copy of the weights) with room for each size of batch."""
    options = item.options.model_copy(update={"max_context": context})
    opened = open_engine(item.model, runtime=runtime, options=options)
    stack.callback(opened.close)
    settle(opened)
    engine = batch_engine(opened)
    draw = np.random.default_rng(seed)
    prompts = draw.integers(0, item.model.config.vocab_size, (max(sizes), prompt_tokens)).tolist()
    return [_Batch(item, engine, engine.open_sequences(size), prompts[:size]) for size in sizes]


def _row(
    one: _Batch, prompt_tokens: int, output_tokens: int, drift: float, about: Sifted, reason: str | None,
    ceilings: Ceilings,
) -> BenchRow:  # fmt: skip
    conditions: dict[str, str | int | float] = {
        "sweep": SWEEP, "form": one.candidate.form, "batch": one.size,
        "prompt_tokens": prompt_tokens, "output_tokens": output_tokens,
        "context": prompt_tokens + output_tokens, "kv_cache": one.engine.kv_cache, "threads": one.engine.threads,
        "isa": one.engine.isa, "drift": round(drift, 4), **round_conditions(range(len(one.tpot_s)), about),
    }  # fmt: skip
    share = step_share(
        one.candidate.model, one.engine.kv_cache, one.size, prompt_tokens + output_tokens // 2, one.engine.threads,
        float(np.median(np.asarray(one.tpot_s)[about.kept])), ceilings,
    )  # fmt: skip
    method = f"median of {len(one.tpot_s)} interleaved repetitions after a warm-up; 95% interval of the median"
    if not about.kept.all():
        method += f"; {about.share_aside:.0%} of them set aside"
    if reason:
        method += f"; noisy: {reason}"
    series = {
        "throughput_tokens_per_s": one.throughput, "ttft_s": one.ttft_s, "tpot_s": one.tpot_s, "itl_s": one.itl_s,
    }  # fmt: skip
    found: dict[str, Measurement] = memory_measurements(one.engine, one.room.memory(), conditions)
    for metric, samples in series.items():
        values = np.asarray(samples)
        found[metric] = timed_measurement(
            metric, values[about.kept].tolist(), method, bool(reason),
            conditions if metric == "ttft_s" else {**conditions, **share},
            set_aside=values[~about.kept].tolist(),
        )  # fmt: skip
    return bench_row(one.candidate, f"{one.candidate.form} x{one.size}", found)


def _gain(held: Sequence[_Batch], about: Sifted) -> list[str]:
    """What the largest batch brings over the smallest, paired by repetition."""
    if len(held) < 2:
        return []
    small, large = held[0], held[-1]
    words = []
    for what, ours, theirs in (
        ("throughput", large.throughput, small.throughput), ("time per token", large.tpot_s, small.tpot_s)
    ):  # fmt: skip
        ratio = paired_ratio(*(np.asarray(own)[about.kept].tolist() for own in (theirs, ours)))
        edges = "" if ratio.low is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
        words.append(f"{what} x{ratio.value:.2f}{edges}")
    name = f"{small.candidate.name} {small.candidate.form}"
    return [f"{name}: {large.size} sequences instead of {small.size}: {', '.join(words)}"]


__all__ = ["batch_sweep"]
