"""What a run leaves behind: every trial, the verdicts, the decision and where it was measured.

`report` renders these records and nothing else, so an old run renders anywhere. A file that
carries an unknown schema version is refused.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationError

from trilemma.core.device import Device
from trilemma.core.duty import DutyCycle
from trilemma.core.environment import Environment
from trilemma.core.errors import InputError
from trilemma.core.limit import Limit
from trilemma.core.payback import Payback
from trilemma.core.recipe import explain
from trilemma.core.record import Record
from trilemma.core.trial import Trial
from trilemma.core.verdict import Verdict

SCHEMA_VERSION: Literal[1] = 1


class DataPart(Record):
    """One of the three disjoint texts: calibrate, select or confirm."""

    name: str
    documents: int
    tokens: int
    text_bytes: int


class Answer(Record):
    """The same prompt continued by the original and by the chosen model, greedily."""

    prompt: str
    original: str
    chosen: str
    first_difference: int | None  # index of the first differing token; None when equal


class ByteRow(Record):
    """Where the bytes went: one role of tensor before and after."""

    role: str  # embedding, attention, ffn, head, norms
    parameters: int
    original_format: str
    original_bytes: int
    chosen_format: str
    chosen_bytes: int


class DataFile(Record):
    """A text that the user gave, so that `check` can find it again and notice when it changed."""

    path: str
    sha256: str


class Conditions(Record):
    """The lengths and amounts behind the figures; `check` measures under the same.

    device, duty: what battery hours were predicted for, if any.
    """

    context: int
    prompt_tokens: int
    output_tokens: int
    repetitions: int
    calibrate_tokens: int = 0
    select_tokens: int = 0
    confirm_tokens: int = 0
    threads: int = 0
    accept_estimates: bool = False
    time_s: float = 0.0
    prepare: Literal["none", "book"] = "none"
    seed: int = 0
    device: Device | None = None
    duty: DutyCycle | None = None


class Decision(Record):
    """What to ship and why, in one sentence. `chosen` names a trial; None when nothing is feasible.

    `alternatives` names trials worth knowing: smallest, balanced, safest.
    """

    sentence: str
    chosen: str | None
    outcome: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    binding_limit: str | None = None
    nearest: tuple[str, ...] = ()
    alternatives: dict[str, str] = {}


class OptimizeReport(Record):
    """The content of report.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: str
    model_hash: str
    panel: Literal["quality", "cost"] = "quality"
    runtime: str = "native"
    objective: str
    limits: tuple[Limit, ...]
    environment: Environment
    data: tuple[DataPart, ...]
    baseline: Trial
    trials: tuple[Trial, ...]
    front: tuple[str, ...]  # trial names, on the Pareto front of (bytes, tpot, KL)
    confirmed: Trial | None = None  # the chosen recipe, measured again with the confirm text
    verdicts: tuple[Verdict, ...] = ()
    decision: Decision
    answers: tuple[Answer, ...] = ()
    bytes_by_role: tuple[ByteRow, ...] = ()
    seconds: float = 0.0
    command: str = ""
    notes: tuple[str, ...] = ()
    data_files: tuple[DataFile, ...] = ()
    payback: tuple[Payback, ...] = ()
    conditions: Conditions | None = None


class BenchRow(Record):
    """Cost of one model in one form. `random_weights` marks shapes without real weights: cost only, no quality."""

    model: str
    parameters: int
    random_weights: bool
    trial: Trial


class BenchReport(Record):
    """The content of a bench results file: what models cost on this machine."""

    schema_version: Literal[1] = SCHEMA_VERSION
    panel: Literal["cost"] = "cost"
    environment: Environment
    rows: tuple[BenchRow, ...]
    command: str = ""
    notes: tuple[str, ...] = ()


def read_bench(text: str) -> BenchReport:
    """Parse a bench results file.

    Raises:
        InputError: not JSON, unknown keys, or a schema version that this release can not read.
    """
    try:
        return BenchReport.model_validate_json(text)
    except ValidationError as error:
        raise InputError(
            f"This is not a bench record of schema version {SCHEMA_VERSION}: {explain(error)[:400]}. "
            "Make it again with `trilemma bench --save`."
        ) from None


def read_report(text: str) -> OptimizeReport:
    """Parse report.json.

    Raises:
        InputError: not JSON, unknown keys, or a schema version that this release can not read.
    """
    try:
        return OptimizeReport.model_validate_json(text)
    except ValidationError as error:
        raise InputError(
            f"This is not a report of schema version {SCHEMA_VERSION}: {explain(error)[:400]}. "
            "Make it again with `trilemma optimize`."
        ) from None
