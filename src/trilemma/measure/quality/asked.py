"""What one opened model is asked beside the texts: its answers to tasks and to prompts."""

from __future__ import annotations

from dataclasses import dataclass

from trilemma.data.windows import TokenSet
from trilemma.measure.quality.answers import generation_row
from trilemma.measure.quality.generation import GenerationCheck, generation_check
from trilemma.measure.quality.reference_store import Progress
from trilemma.measure.quality.tasks.figures import TaskAnswers, answer_task, task_row
from trilemma.measure.quality.tasks.items import Task
from trilemma.measure.quality.texts import tokenizer_of
from trilemma.measure.results import GenerationRow, TaskRow
from trilemma.model.model import Model
from trilemma.runtime.engine import Engine


@dataclass(frozen=True)
class Work:
    """What is measured of every model; texts and prompts only where there are any."""

    token_set: TokenSet | None
    tasks: tuple[Task, ...]
    prompts: list[list[int]]
    answer_tokens: int


@dataclass(frozen=True)
class Answers:
    """One model's answers to tasks and prompts."""

    tasks: tuple[TaskAnswers, ...]
    check: GenerationCheck | None


def ask(engine: Engine, model: Model, work: Work, before: Answers | None, progress: Progress | None) -> Answers:
    """The model's answers to the tasks and to the prompts."""
    answers: tuple[TaskAnswers, ...] = ()
    if work.tasks:
        tokenizer = tokenizer_of(model)
        answers = tuple(answer_task(engine, tokenizer, task, progress) for task in work.tasks)
    if not work.prompts:
        return Answers(answers, None)
    baseline = None if before is None else before.check
    check = generation_check(
        engine, work.prompts, max_tokens=work.answer_tokens, baseline=baseline, progress=progress
    )  # fmt: skip
    return Answers(answers, check)


def task_rows(work: Work, found: Answers, before: Answers | None, context: int) -> tuple[TaskRow, ...]:
    """The figures of the tasks; paired to the reference's answers where there are any."""
    old = (None,) * len(work.tasks) if before is None else before.tasks
    return tuple(
        task_row(task, given, base, context=context)
        for task, given, base in zip(work.tasks, found.tasks, old, strict=True)
    )


def written_row(work: Work, found: Answers, before: Answers | None, model: Model) -> GenerationRow | None:
    """The figures of the greedy answers; None where no prompts were given."""
    if found.check is None:
        return None
    baseline = None if before is None else before.check
    decode = tokenizer_of(model).decode
    return generation_row(work.prompts, found.check, baseline, decode, max_tokens=work.answer_tokens)
