"""Records of `trilemma eval` and `trilemma compare`: plain, versioned, with the environment."""

from __future__ import annotations

from trilemma.core.environment import Environment
from trilemma.core.measurement import Measurement
from trilemma.core.record import Record

SCHEMA_VERSION = 1


class DomainRow(Record):
    """Quality on one domain; 'all' pools the domains where there are several."""

    domain: str
    documents: int
    tokens: int
    measurements: dict[str, Measurement]


class TaskRow(Record):
    """One task of right and wrong answers; `answers` holds the chosen option of each item (1 or 0 where there is none).

    gained, lost: items that the reference had wrong and this model right, and the other way round.
    """

    task: str
    kind: str  # choices, contexts or continuation
    items: int
    truncated: int = 0  # items whose text was cut at the left to fit the context
    measurements: dict[str, Measurement]
    gained: int | None = None
    lost: int | None = None
    answers: tuple[int, ...] = ()


class AnswerPair(Record):
    """A prompt continued greedily by the reference and by the model; `first_difference` is a token's index."""

    prompt: str
    reference: str | None
    answer: str
    first_difference: int | None


class GenerationRow(Record):
    """What greedy continuations of the texts look like, with a few of them side by side."""

    prompts: int
    max_tokens: int
    collapsed: bool
    measurements: dict[str, Measurement]
    answers: tuple[AnswerPair, ...] = ()


class EvaluateResult(Record):
    """Quality of one model, with what it was compared to."""

    schema_version: int = SCHEMA_VERSION
    model: str
    reference: str | None
    context: int
    prepare: str
    environment: Environment
    rows: tuple[DomainRow, ...]
    notes: tuple[str, ...] = ()
    protocol: str = "windows"
    stride: int | None = None
    tasks: tuple[TaskRow, ...] = ()
    generation: GenerationRow | None = None


class CompareRow(Record):
    """One model's figures, and those paired to the first: metric -> (ratio, low, high)."""

    name: str
    measurements: dict[str, Measurement]
    relative: dict[str, tuple[float, float | None, float | None]]


class CompareResult(Record):
    """Models side by side; the first is the reference."""

    schema_version: int = SCHEMA_VERSION
    context: int | None
    environment: Environment
    rows: tuple[CompareRow, ...]
    notes: tuple[str, ...] = ()
