"""What a model answers to a task's items, and how often it is right; against a reference also what changed.

`accuracy/<task>` and `accuracy_norm/<task>` are lm-eval's acc and acc_norm: the likeliest option, and the likeliest
by character of the answer. Where an item has one continuation only, right means that greedy decoding says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import DataError, InputError
from trilemma.core.measurement import Measurement
from trilemma.measure.quality.item_shares import paired_change, share_of_items, standard_error
from trilemma.measure.quality.loglikelihood import Likelihood, LikelihoodEngine, encode_request
from trilemma.measure.quality.reference_store import Progress
from trilemma.measure.quality.tasks.items import Task, TaskItem
from trilemma.measure.results import TaskRow
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime.engine import Engine

_METHOD = {
    "choices": "the likeliest choice after the query",
    "contexts": "the context after which the continuation is likeliest",
    "continuation": "every token of the continuation is the most likely one",
}
_INTERVAL = "Wilson interval over items"
_PAIRED = "paired with the reference on the same items; Agresti-Min interval"


@dataclass(frozen=True)
class TaskAnswers:
    """One model's answers: likelihoods of each item's options, and the items that were cut at the left."""

    likelihoods: tuple[tuple[Likelihood, ...], ...]
    truncated: int = 0


def answer_task(engine: Engine, tokenizer: Tokenizer, task: Task, progress: Progress | None = None) -> TaskAnswers:
    """Likelihoods of all options of a task's items.

    Raises:
        InputError: an answer longer than the engine's context. EngineError: logits that are not finite.
    """
    if not task.items:
        raise DataError(f"The task '{task.name}' has no items.")
    found, truncated = [], 0
    with LikelihoodEngine(engine) as likelihoods:
        for number, item in enumerate(task.items, 1):
            try:
                requests = [encode_request(tokenizer, context, text) for context, text in item.options]
                found.append(tuple(likelihoods.score(requests)))
            except InputError as error:
                raise InputError(f"Item {number} of the task '{task.name}': {error}") from None
            truncated += any(request.is_cut(engine.max_context) for request in requests)
            if progress is not None:
                progress(number, len(task.items), f"task {task.name}")
    return TaskAnswers(tuple(found), truncated)


def task_row(task: Task, answers: TaskAnswers, reference: TaskAnswers | None, *, context: int) -> TaskRow:
    """Accuracies with intervals over items; against a reference also the paired change and the items that moved."""
    chosen, hits = _chosen(task, answers)
    conditions: dict[str, str | int | float] = {
        "items": len(task.items), "context": context, "stderr": standard_error(hits)
    }  # fmt: skip

    def measure(metric: str, right: NDArray[np.bool_], how: str) -> Measurement:
        share = share_of_items(right)
        return Measurement.of(
            metric, share.value, method=f"{how}; {_INTERVAL}", ci95=share.ci95, n=len(right),
            conditions={**conditions, "stderr": standard_error(right)},
        )  # fmt: skip

    name = task.name
    found = {f"accuracy/{name}": measure(f"accuracy/{name}", hits, _METHOD[task.kind])}
    if task.kind == "choices":
        normed = [_likeliest(item, given, by_length=True) for item, given in _pairs(task, answers)]
        right = np.asarray([at == item.gold for at, item in zip(normed, task.items, strict=True)])
        found[f"accuracy_norm/{name}"] = measure(
            f"accuracy_norm/{name}", right, "the likeliest choice by character of its text"
        )
    gained = lost = None
    if reference is not None:
        change, gained, lost = paired_change(_chosen(task, reference)[1], hits)
        found[f"accuracy_change/{name}"] = Measurement.of(
            f"accuracy_change/{name}", change.value, method=_PAIRED, ci95=change.ci95, n=len(hits),
            conditions={"items": len(hits), "context": context, "gained": gained, "lost": lost},
        )  # fmt: skip
    return TaskRow(
        task=name, kind=task.kind, items=len(hits), truncated=answers.truncated, measurements=found, gained=gained,
        lost=lost, answers=tuple(chosen),
    )  # fmt: skip


def _pairs(task: Task, answers: TaskAnswers) -> list[tuple[TaskItem, tuple[Likelihood, ...]]]:
    return list(zip(task.items, answers.likelihoods, strict=True))


def _chosen(task: Task, answers: TaskAnswers) -> tuple[list[int], NDArray[np.bool_]]:
    """(the option chosen for each item, whether it is right); a single continuation is 1 where it matched."""
    if task.kind == "continuation":
        greedy = [given[0].greedy for given in answers.likelihoods]
        return [int(match) for match in greedy], np.asarray(greedy, np.bool_)
    chosen = [_likeliest(item, given, by_length=False) for item, given in _pairs(task, answers)]
    return chosen, np.asarray([at == item.gold for at, item in zip(chosen, task.items, strict=True)], np.bool_)


def _likeliest(item: TaskItem, given: Sequence[Likelihood], *, by_length: bool) -> int:
    nats = np.asarray([found.nats for found in given])
    return int(np.argmax(nats / np.asarray(item.lengths, np.float64) if by_length else nats))
