"""What binds a deployed model, how that was tested, and what would help: the record of `inspect --diagnose`."""

from __future__ import annotations

from typing import Literal

from trilemma.core.environment import Environment
from trilemma.core.record import Record

Phase = Literal["prefill", "decode"]
Cause = Literal["memory", "compute", "overhead"]
Complaint = Literal["slow", "large", "hungry"]
RemedyKind = Literal["model structure", "decoding", "system"]
GainSource = Literal["measured", "predicted", "estimated"]

CAUSES: tuple[Cause, ...] = ("memory", "compute", "overhead")


class Ratio(Record):
    """A value with its 95% interval. 'predicted': arithmetic on what was measured; 'estimated': constants."""

    value: float
    low: float | None = None
    high: float | None = None
    source: GainSource = "measured"


class Probe(Record):
    """One intervention: what was changed, what was held, and time after over time before, paired."""

    name: str
    phase: Phase
    changed: str
    held: str
    ratio: Ratio
    says: str


class PhaseDiagnosis(Record):
    """What a phase's time answers to.

    seconds: of one output token (decode) or of the whole prompt (prefill).
    shares: of the time that answers to bytes read, to multiply-accumulates, and to neither.
    least_s: time that the bytes alone and the arithmetic alone would take at the ceilings of this run.
    bound: the largest share; `clear` when its interval lies above those of the others.
    """

    phase: Phase
    seconds: Ratio
    shares: dict[Cause, Ratio]
    least_s: dict[Literal["memory", "compute"], float]
    bound: Cause
    clear: bool
    sentence: str


class Remedy(Record):
    """One thing to do. `gains` are after over before: tpot, ttft, memory, energy, cost (of a token in a batch)."""

    kind: RemedyKind
    name: str
    what: str
    command: str
    quality: Literal["unchanged", "changes: measure it"]
    gains: dict[str, Ratio]
    note: str = ""


class Diagnosis(Record):
    """The whole answer. `deployed` says what was run: the model itself, or a twin of random weights."""

    schema_version: Literal[1] = 1
    model: str
    architecture: str
    deployed: str
    environment: Environment
    prompt_tokens: int
    output_tokens: int
    weights_bytes: int
    kv_bytes: int
    kv_share_of_bytes: float
    read_bandwidth_bytes_per_s: float
    compute_macs_per_s: float
    phases: tuple[PhaseDiagnosis, ...]
    probes: tuple[Probe, ...]
    remedies: tuple[Remedy, ...]
    complaint: Complaint | None = None
    noisy: str | None = None
    notes: tuple[str, ...] = ()
