"""What `optimize` hands back to Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trilemma.core.results import OptimizeReport
from trilemma.core.trial import Trial
from trilemma.core.verdict import Verdict


@dataclass(frozen=True)
class OptimizeResult:
    """The decision with its evidence.

    best: the chosen trial as confirmed, or None when nothing is feasible or time was too short;
    front: trials on the Pareto front of (weights_bytes, tpot_s, kl_mean);
    exit_code: 0 all PASS, 3 a limit FAILs or none is feasible, 4 INCONCLUSIVE;
    output: the written artifact folder, or None;
    unfinished: the time was too short for a decision; a run with more time takes up what was measured.
    """

    best: Trial | None
    front: tuple[Trial, ...]
    verdicts: tuple[Verdict, ...]
    report: OptimizeReport
    exit_code: int
    output: Path | None = None
    unfinished: bool = False
