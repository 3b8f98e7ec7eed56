"""The precision ladder of one model: what each precision costs and saves, where it breaks, what repairs it."""

from __future__ import annotations

from typing import Literal

from trilemma.core.environment import Environment
from trilemma.core.measurement import Measurement
from trilemma.core.record import Record


class Rung(Record):
    """One precision, or one repair of another rung (`repairs` names it).

    relative: ttft_s and tpot_s over those of the first rung, paired: (ratio, low, high).
    prefill_macs_per_s, decode_bytes_per_s: achieved rates; the shares are of the ceilings of the same run.
    failed: why there is no quality (f16 overflowed, say).
    """

    name: str
    what: str
    runtime: str = "native"
    repairs: str | None = None
    measurements: dict[str, Measurement] = {}
    relative: dict[str, tuple[float, float | None, float | None]] = {}
    prefill_macs_per_s: float | None = None
    compute_share: float | None = None
    decode_bytes_per_s: float | None = None
    bandwidth_share: float | None = None
    failed: str = ""


class Ladder(Record):
    """All rungs, measured side by side on one text and machine.

    largest_activation: in f32 arithmetic on calibration text; f16 holds up to 65,504.
    outlier_ratio: of the worst channel to the median one, at the matrix input `outlier_at`.
    findings: sentences that follow from the figures.
    """

    schema_version: Literal[1] = 1
    model: str
    environment: Environment
    context: int
    prompt_tokens: int
    output_tokens: int
    rungs: tuple[Rung, ...]
    largest_activation: float
    largest_at: str
    outlier_ratio: float
    outlier_at: str
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def rung(self, name: str) -> Rung:
        return next(rung for rung in self.rungs if rung.name == name)
