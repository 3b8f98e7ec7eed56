"""What binds a model on this machine: memory, compute or overhead, found by interventions and not by guessing.

Each intervention changes one thing and holds the rest: four sequences at once (four times the
arithmetic over the same weight bytes), half a prompt, a hollow twin with the same number of layers
(overhead alone), twins with fewer bytes, another number of threads. All take turns in one
interleaved run; ratios are paired. From them come the shares of time that answer to bytes, to
arithmetic and to neither. What to do about it is `remedies.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.core.diagnosis import CAUSES, Cause, Complaint, Diagnosis, Phase, PhaseDiagnosis, Probe, Ratio
from trilemma.core.environment import read_environment, total_memory_bytes, usable_cores
from trilemma.core.errors import InputError
from trilemma.core.quantity import format_percent, format_quantity
from trilemma.formats.artifact import weights_bytes
from trilemma.measure.bench import decode_bytes
from trilemma.measure.device.ceilings import read_bandwidth
from trilemma.measure.device.compute_ceiling import compute_rate
from trilemma.measure.stats import Interval, median_interval
from trilemma.measure.timing.interleave import Case, Rounds, interleave
from trilemma.model.cost import describe, kv_bytes, macs_per_token, matrix_macs_per_token, prompt_macs
from trilemma.model.model import Model
from trilemma.runtime.engine import EngineOptions, KvCache
from trilemma.runtime.native import NativeEngine
from trilemma.search.diagnosis import cases
from trilemma.search.diagnosis.deployed import Deployed, hollow, open_deployed, restructured
from trilemma.search.diagnosis.remedies import Measured, candidates, find_remedies

MEMORY_SHARE = 0.5  # of the machine's memory that the model and its twins may fill together
BATCH = 4
PHASES: tuple[Phase, ...] = ("prefill", "decode")
Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompt and of the output, and the positions that a middle token of the output sees."""

    prompt: int
    output: int

    @property
    def context(self) -> int:
        return self.prompt + self.output // 2


def diagnose(
    model: str | Path | Deployed,
    *,
    prompt_tokens: int = 128,
    output_tokens: int = 32,
    threads: int | None = None,
    kv: KvCache | None = None,
    complaint: Complaint | None = None,
    time_limit_s: float = 25.0,
    rounds: int = 25,
    progress: Progress | None = None,
) -> Diagnosis:
    """Measure a model as deployed, test what binds it, and list what would help.

    Args:
        model: a checkpoint, artifact, bare config.json, hub id, or GGUF file or folder.
        prompt_tokens, output_tokens: of the request that is too slow; at least 8 and 4.
        threads: all usable cores by default.
        kv: precision of the cache; the model's own by default.
        complaint: orders the remedies: 'slow' by time, 'large' by memory, 'hungry' by energy.
        time_limit_s: no round of interventions begins after it.

    Raises:
        InputError: lengths that the model's context does not hold.
    """
    opened = open_deployed(model) if isinstance(model, str | Path) else model
    lengths = _lengths(opened.model, prompt_tokens, output_tokens)
    with ExitStack() as stack:
        desk = _Desk(opened.model, lengths, threads or usable_cores(), kv, stack)
        base = desk.base
        plan = desk.plan()
        notes = desk.notes
        if opened.foreign:
            notes.append("MODEL in the commands is the checkpoint that the GGUF file was made from.")
        if progress is not None:
            progress(0, rounds, f"{len(plan)} interventions")
        run = interleave(
            plan,
            threads=base.threads,
            rounds=rounds,
            time_limit_s=time_limit_s,
            progress=progress,
            what="interventions",
        )
        reads = decode_bytes(opened.model, base.kv_cache, lengths.context)
        held = kv_bytes(opened.model.config, base.kv_cache, lengths.context)
        bandwidth = read_bandwidth(base.threads, reads).bytes_per_s
        first = next(iter(opened.model.config.linear_names()), "embedding.weight")
        format_name = opened.model.format_of(first)
        rate = compute_rate(format_name, opened.model.linear(first).activation, base.threads).macs_per_s
        # A ceiling is the best that this run has seen: the prefill itself counts.
        rate = max(rate, prompt_macs(opened.model.config, lengths.prompt) / float(run.of("base", "prefill").min()))
        ceilings = _least_times(opened.model, lengths, reads, bandwidth, rate)
        phases = tuple(judge_phase(phase, run, ceilings[phase]) for phase in PHASES)
        measured = Measured(
            deployed=opened, run=run, phases={phase.phase: phase for phase in phases}, twins=desk.twins,
            bytes_of=desk.bytes_of, threads=base.threads, other_threads=desk.other_threads, kv_cache=base.kv_cache,
            kv_share=held / reads, context=lengths.context,
            given="MODEL" if isinstance(model, Deployed) or opened.foreign else str(model),
        )  # fmt: skip
        return Diagnosis(
            model=opened.name, architecture=describe(opened.model.config), deployed=opened.what,
            environment=read_environment(isa=base.isa, threads=base.threads), prompt_tokens=lengths.prompt,
            output_tokens=lengths.output, weights_bytes=weights_bytes(opened.model), kv_bytes=held,
            kv_share_of_bytes=held / reads, read_bandwidth_bytes_per_s=bandwidth, compute_macs_per_s=rate,
            phases=phases, probes=tuple(_probes(run, desk)), remedies=find_remedies(measured, complaint),
            complaint=complaint, noisy=run.noisy, notes=tuple(notes),
        )  # fmt: skip


def _lengths(model: Model, prompt_tokens: int, output_tokens: int) -> Lengths:
    longest = model.config.max_context
    if prompt_tokens < 8 or output_tokens < BATCH or prompt_tokens + output_tokens > longest:
        raise InputError(
            f"A request of {prompt_tokens} prompt and {output_tokens} output tokens can not be diagnosed: at least 8 "
            f"and {BATCH} are needed, and {longest} together fit this model's context."
        )
    return Lengths(prompt_tokens, output_tokens)


class _Desk:
    """Opens the model and what it is compared with, as far as memory allows."""

    def __init__(self, model: Model, lengths: Lengths, threads: int, kv: KvCache | None, stack: ExitStack) -> None:
        self.lengths, self._stack, self._kv = lengths, stack, kv
        self._room = MEMORY_SHARE * (total_memory_bytes() or 8e9)
        self.notes: list[str] = []
        self.twins: dict[str, Model] = {}
        self.bytes_of: dict[str, int] = {}
        self.base = self.open("base", model, threads=threads)
        self.other_threads = 1 if self.base.threads > 1 else usable_cores()
        self.model = model

    def open(self, name: str, model: Model, *, threads: int | None = None, kv: KvCache | None = None) -> NativeEngine:
        longest = self.lengths.prompt + self.lengths.output
        options = EngineOptions(
            threads=threads or self.base.threads, kv_cache=kv or self._kv,
            max_context=min(longest, model.config.max_context),
        )  # fmt: skip
        engine = NativeEngine(model, options)
        self._stack.callback(engine.close)
        self._room -= engine.memory().total_bytes
        self.bytes_of[name] = engine.memory().weights_bytes + engine.memory().kv_bytes
        return engine

    def fits(self, name: str, model: Model) -> bool:
        if weights_bytes(model) <= self._room:
            return True
        self.notes.append(f"'{name}' does not fit in memory beside the model: its gain is predicted, not measured")
        return False

    def plan(self) -> dict[str, Case]:
        """Every case of the interleaved run; what does not fit is left out."""
        lengths = self.lengths
        tiny = self.open("hollow", restructured(self.model, hollow(self.model.config)))
        found: dict[str, Case] = {
            "base": cases.request(self.base, lengths.prompt, lengths.output),
            "half prompt": cases.prompt_only(self.base, lengths.prompt // 2),
            "hollow": cases.request(tiny, lengths.prompt, lengths.output),
            "batch 1": cases.batch(self.base, 1, lengths.prompt, lengths.output),
            f"batch {BATCH}": cases.batch(self.base, BATCH, lengths.prompt, lengths.output),
            f"verify {BATCH}": cases.verify(self.base, BATCH, lengths.prompt, lengths.output),
        }
        if self.other_threads != self.base.threads and self.fits("threads", self.model):
            engine = self.open("threads", self.model, threads=self.other_threads)
            found["threads"] = cases.request(engine, lengths.prompt, lengths.output)
        for candidate in candidates(self.model, self.base.kv_cache):
            twin = candidate.make()
            self.twins[candidate.name] = twin
            if self.fits(candidate.name, twin):
                engine = self.open(candidate.name, twin, kv=candidate.kv)
                found[candidate.name] = cases.request(engine, lengths.prompt, lengths.output)
        return found


def judge_phase(phase: Phase, run: Rounds, least_s: dict[str, float]) -> PhaseDiagnosis:
    """Shares of a phase's time, from the rounds of one run.

    Decode: (batch of 4 - batch of 1) / 3 is what one more token's arithmetic costs over the same bytes.
    Prefill: twice what half the prompt saves. Overhead is the hollow twin's time; memory is the rest.
    """
    base = run.of("base", phase)
    overhead = run.of("hollow", phase) / base
    if phase == "decode":
        compute = (run.of(f"batch {BATCH}", phase) - run.of("batch 1", phase)) / (BATCH - 1) / base
    else:
        compute = 2 * (1 - run.of("half prompt", phase) / base)
    shares = _shares({"overhead": overhead, "compute": compute, "memory": 1 - overhead - compute})
    bound = max(CAUSES, key=lambda cause: shares[cause].value)
    others = [shares[cause] for cause in CAUSES if cause != bound]
    low = shares[bound].low
    clear = low is not None and all(other.high is not None and low > other.high for other in others)
    seconds = ratio_of(median_interval(base))
    return PhaseDiagnosis(
        phase=phase, seconds=seconds, shares=shares,
        least_s={"memory": least_s["memory"], "compute": least_s["compute"]},
        bound=bound, clear=clear, sentence=_sentence(phase, bound, clear, shares, seconds.value, least_s),
    )  # fmt: skip


def _shares(samples: dict[Cause, NDArray[np.float64]]) -> dict[Cause, Ratio]:
    """Medians with intervals, cut to [0, 1] and made to add up: overhead first, then arithmetic, the rest is memory."""
    found = {cause: median_interval(values) for cause, values in samples.items()}
    overhead = _cut(found["overhead"].value)
    compute = min(_cut(found["compute"].value), 1 - overhead)
    values: dict[Cause, float] = {"memory": 1 - overhead - compute, "compute": compute, "overhead": overhead}
    shares: dict[Cause, Ratio] = {}
    for cause in CAUSES:
        low, high = found[cause].ci95 or (0.0, 1.0)
        low, high = min(_cut(low), values[cause]), max(_cut(high), values[cause])
        shares[cause] = Ratio(value=values[cause], low=low, high=high)
    return shares


def _cut(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def ratio_of(found: Interval) -> Ratio:
    """A measured ratio with its interval, as a record."""
    return Ratio(value=found.value, low=found.low, high=found.high)


_WORDS: dict[Cause, str] = {
    "memory": "the bytes it reads",
    "compute": "its multiply-accumulates",
    "overhead": "what a pass costs whatever is in it",
}


def _sentence(
    phase: Phase, bound: Cause, clear: bool, shares: dict[Cause, Ratio], seconds: float, least_s: dict[str, float]
) -> str:
    what = f"{phase} is bound by {bound}: {format_percent(shares[bound].value)} of its time answers to {_WORDS[bound]}"
    if not clear:
        second = max((cause for cause in CAUSES if cause != bound), key=lambda cause: shares[cause].value)
        what = (
            f"{phase} is not clearly bound by one thing: {bound} {format_percent(shares[bound].value)}, "
            f"{second} {format_percent(shares[second].value)}, with intervals that overlap"
        )
    if bound == "overhead":
        return what
    least = least_s[bound]
    does = "reading" if bound == "memory" else "multiplying"
    would = f"{format_quantity(least, 's')}, {format_percent(least / seconds)}"
    rest = ""
    if least / seconds < shares[bound].value / 2:
        rest = ": the rest is what the kernels do " + ("with each byte" if bound == "memory" else "besides multiplying")
    return f"{what}; {does} at the ceiling of this run would take {would}{rest}"


def _least_times(
    model: Model, lengths: Lengths, reads: int, bandwidth: float, rate: float
) -> dict[Phase, dict[str, float]]:
    macs = macs_per_token(model.config, lengths.context)
    return {
        "decode": {"memory": reads / bandwidth, "compute": macs / rate},
        "prefill": {
            "memory": weights_bytes(model) / bandwidth,
            "compute": prompt_macs(model.config, lengths.prompt) / rate,
        },
    }


def _probes(run: Rounds, desk: _Desk) -> list[Probe]:
    """The interventions as evidence, in words."""
    found = [
        _probe(run, "decode", f"batch {BATCH}", "batch 1", f"{BATCH} sequences at once: {BATCH} x the arithmetic",
               "weight bytes", f"x1 if only bytes count, x{BATCH} if only arithmetic does"),
        _probe(run, "prefill", "half prompt", "base", "half the prompt: half the arithmetic", "weight bytes",
               "x1 if only bytes count, x0.5 if only arithmetic does"),
    ]  # fmt: skip
    for phase in PHASES:
        changed = "a twin with hardly any weights"
        found.append(_probe(run, phase, "hollow", "base", changed, "number of layers", "the rest is overhead"))
    for name in ("W8A8-g32", "W4A8-g32"):
        if name in run.samples:
            share = desk.bytes_of[name] / desk.bytes_of["base"]
            macs = f"{matrix_macs_per_token(desk.model.config) / 1e6:.1f} M MACs a token (in other kernels)"
            for phase in PHASES:
                says = f"x{share:.2f} if only bytes count"
                found.append(_probe(run, phase, name, "base", f"a twin in {name}: bytes x{share:.2f}", macs, says))
    if "threads" in run.samples:
        for phase in PHASES:
            changed = f"{desk.other_threads} threads for {desk.base.threads}"
            says = f"x{desk.base.threads / desk.other_threads:.2g} if cores decide"
            found.append(_probe(run, phase, "threads", "base", changed, "bytes and arithmetic", says))
    return found


def _probe(run: Rounds, phase: Phase, case: str, before: str, changed: str, held: str, says: str) -> Probe:
    ratio = ratio_of(median_interval(run.of(case, phase) / run.of(before, phase)))
    return Probe(name=case, phase=phase, changed=changed, held=held, ratio=ratio, says=says)
