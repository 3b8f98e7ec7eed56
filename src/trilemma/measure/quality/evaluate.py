"""Quality of one model or several: on texts by domain, on tasks, in what they write; alone or against a reference."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.core.environment import read_environment
from trilemma.core.errors import DataError, InputError
from trilemma.core.measurement import Measurement
from trilemma.data.documents import Prepare
from trilemma.data.windows import Protocol, TokenSet
from trilemma.formats.artifact import load_any
from trilemma.measure.quality.answers import prompts_from
from trilemma.measure.quality.asked import Answers, Work, ask, task_rows, written_row
from trilemma.measure.quality.figures import likelihood, score, summarize, token_documents, token_likelihood
from trilemma.measure.quality.reference_store import Progress, Reference
from trilemma.measure.quality.tasks.items import read_task
from trilemma.measure.quality.texts import (
    DEFAULT_TOKENS,
    Paths,
    choose_context,
    read_token_set,
)
from trilemma.measure.results import DomainRow, EvaluateResult
from trilemma.model.model import Model, RunSettings
from trilemma.runtime import open_engine
from trilemma.runtime.engine import Engine, EngineOptions

__all__ = [
    "DEFAULT_TOKENS",
    "Paths",
    "build_reference",
    "choose_context",
    "evaluate",
    "evaluate_all",
    "read_token_set",
]

ANSWER_TOKENS = 64


def evaluate(
    model: Model | str | Path,
    data: Paths | Mapping[str, Paths] | None = None,
    *,
    reference: Model | str | Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    protocol: Protocol = "windows",
    max_tokens: int | None = DEFAULT_TOKENS,
    prepare: Prepare = "none",
    tasks: Mapping[str, str | Path] | None = None,
    limit_items: int | None = None,
    generate: int = 0,
    answer_tokens: int = ANSWER_TOKENS,
    runtime: str = "native",
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> EvaluateResult:
    """Perplexity a token, word and byte with intervals over documents; tasks; with a reference also paired figures.

    Args:
        model: a model, or a path of one.
        data: text files, or domain -> text files. May be left out where there are tasks.
        reference: the unmodified model; adds ppl_increase, kl_mean, kl_p99, kl_p999 and top1_agreement, and what
            changed in tasks and answers.
        context: tokens a window of text; the model's own up to 2048 by default, and always for tasks.
        stride: tokens from one window's start to the next, of which only so many are scored; None: no overlap.
        protocol: 'windows' within documents, or 'llama.cpp', as its perplexity tool cuts and scores.
        max_tokens: for each domain, spread evenly over its documents; None takes all.
        prepare: 'book' or 'none', see `data.read_documents`.
        tasks: name -> file of log-likelihood items, see `measure.quality.tasks.items`.
        limit_items: of each task, the first so many.
        generate: prompts from the beginnings of the texts that are continued greedily; 0: none.
        answer_tokens: the most that such a continuation has.
        runtime, options: how the model is run.

    Raises:
        DataError: texts or tasks that can not be used. CheckpointError: the model has no tokenizer.
        InputError: a context longer than the model's, or prompts without texts.
    """
    found = evaluate_all(
        [model], data, reference=reference, context=context, stride=stride, protocol=protocol, max_tokens=max_tokens,
        prepare=prepare, tasks=tasks, limit_items=limit_items, generate=generate, answer_tokens=answer_tokens,
        runtime=runtime, options=options, progress=progress,
    )  # fmt: skip
    return found[0]


def evaluate_all(
    models: Sequence[Model | str | Path],
    data: Paths | Mapping[str, Paths] | None = None,
    *,
    reference: Model | str | Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    protocol: Protocol = "windows",
    max_tokens: int | None = DEFAULT_TOKENS,
    prepare: Prepare = "none",
    tasks: Mapping[str, str | Path] | None = None,
    limit_items: int | None = None,
    generate: int = 0,
    answer_tokens: int = ANSWER_TOKENS,
    runtime: str = "native",
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> list[EvaluateResult]:
    """`evaluate` for several models on the same text; the reference is run once.

    With a reference all models are scored on the same tokens, the first one's; without, each reads the text
    with its own tokenizer. Tasks are always read with a model's own.

    Raises:
        InputError: no model. EngineError: with a reference, a model of another vocabulary. Else as `evaluate`.
    """
    if not models:
        raise InputError("There is no model to evaluate. Give at least one.")
    loaded = [_load(model) for model in models]
    length = min(choose_context(model, context) for model in loaded)
    longest = length if not tasks else max(length, min(choose_context(model, None) for model in loaded))
    chosen = (options or EngineOptions()).model_copy(update={"max_context": longest})
    items = tuple(read_task(name, path, limit_items) for name, path in (tasks or {}).items())
    _check_asked(bool(data), bool(items), generate, answer_tokens, length)

    def work_of(model: Model) -> Work:
        if not data:
            return Work(None, items, [], answer_tokens)
        texts = read_token_set(model, data, length, max_tokens, prepare, stride=stride, protocol=protocol)
        return Work(texts, items, prompts_from(texts, generate), answer_tokens)

    if reference is None:
        measured = [_alone(model, work_of(model), runtime, chosen, progress) for model in loaded]
        notes: list[str] = []
    else:
        measured, notes = _paired(loaded, _load(reference), work_of(loaded[0]), runtime, chosen, progress)
    return [
        found.model_copy(update={
            "model": _name(model), "reference": None if reference is None else _name(reference), "context": length,
            "stride": stride, "protocol": protocol, "prepare": prepare, "notes": (*notes, *_notes(found)),
        })
        for model, found in zip(models, measured, strict=True)
    ]  # fmt: skip


def build_reference(
    base: Model, token_set: TokenSet, folder: str | Path, *, runtime: str = "native",
    options: EngineOptions | None = None, key: str = "", progress: Progress | None = None,
) -> Reference:  # fmt: skip
    """Score a token set with the unmodified model; its own KV policy is replaced by f32.

    The engine is `runtime`; 'torch' for those that compute in 16 bits, 'native' for llama.cpp, which rounds inputs.
    """
    engine = _open_base(base, runtime, (options or EngineOptions()).model_copy(update={
        "max_context": token_set.context
    }))  # fmt: skip
    try:
        return Reference.build(engine, token_set, folder, key=key, progress=progress)
    finally:
        engine.close()


def _open_base(base: Model, runtime: str, options: EngineOptions) -> Engine:
    plain = base.with_run(RunSettings(kv_cache="f32"))
    chosen = options.model_copy(update={"kv_cache": "f32"})
    exact = "native" if runtime == "llama.cpp" else runtime.removesuffix("-f16").removesuffix("-bf16")
    return open_engine(plain, runtime=exact, options=chosen)


def _check_asked(texts: bool, tasks: bool, generate: int, answer_tokens: int, context: int) -> None:
    if not texts and not tasks:
        raise DataError(
            "Quality needs text or tasks. Give a file with --data, name=file with --domain, or name=file with --task."
        )
    if generate < 0 or (generate and not texts):
        raise InputError(f"{generate} prompts can not be taken from no texts. Give texts with --data as well.")
    if generate and not 1 <= answer_tokens <= context // 2:
        raise InputError(f"Answers of {answer_tokens} tokens do not fit the context of {context}; at most half of it.")


def _alone(model: Model, work: Work, runtime: str, options: EngineOptions, progress: Progress | None) -> EvaluateResult:
    engine = open_engine(model, runtime=runtime, options=options)
    try:
        rows: list[DomainRow] = []
        if work.token_set is not None:
            nll = token_likelihood(engine, work.token_set, progress)
            parts = _by_domain(work.token_set)
            rows = [_row(name, part, likelihood(nll[chosen], part)) for name, part, chosen in parts]
        answers = ask(engine, model, work, None, progress)
    finally:
        engine.close()
    return _result(engine, rows, work, answers, None, model)


def _paired(
    models: Sequence[Model], base: Model, work: Work, runtime: str, options: EngineOptions,
    progress: Progress | None,
) -> tuple[list[EvaluateResult], list[str]]:  # fmt: skip
    before = _base_answers(base, work, runtime, options, progress)
    measured = []
    with tempfile.TemporaryDirectory(prefix="trilemma-reference-") as folder:
        reference = None
        if work.token_set is not None:
            reference = build_reference(
                base, work.token_set, folder, runtime=runtime, options=options, progress=progress
            )
        for model in models:
            engine = open_engine(model, runtime=runtime, options=options)
            try:
                rows = [] if reference is None else _paired_rows(engine, reference, progress)
                answers = ask(engine, model, work, before, progress)
            finally:
                engine.close()
            measured.append(_result(engine, rows, work, answers, before, model))
        return measured, [] if reference is None else list(reference.notes)


def _paired_rows(engine: Engine, reference: Reference, progress: Progress | None) -> list[DomainRow]:
    scores = score(engine, reference, progress)
    return [
        _row(name, part, summarize(scores.rows(chosen), part, reference.nll[chosen], reference.engine_name))
        for name, part, chosen in _by_domain(reference.token_set)
    ]


def _base_answers(
    base: Model, work: Work, runtime: str, options: EngineOptions, progress: Progress | None
) -> Answers | None:
    if not work.tasks and not work.prompts:
        return None
    engine = _open_base(base, runtime, options)
    try:
        return ask(engine, base, work, None, progress)
    finally:
        engine.close()


def _result(
    engine: Engine, rows: Sequence[DomainRow], work: Work, found: Answers, before: Answers | None, model: Model
) -> EvaluateResult:
    """The measured part of a record; `evaluate_all` fills in what it was asked."""
    return EvaluateResult(
        model="", reference=None, context=engine.max_context, prepare="none",
        environment=read_environment(isa=engine.isa, threads=engine.threads), rows=tuple(rows),
        tasks=task_rows(work, found, before, engine.max_context), generation=written_row(work, found, before, model),
    )  # fmt: skip


def _by_domain(token_set: TokenSet) -> list[tuple[str, TokenSet, NDArray[np.bool_]]]:
    """(name, its windows, which rows of token figures are its own); 'all' first where there are several."""
    owners = np.asarray(token_set.domains)[token_documents(token_set)]
    names = list(dict.fromkeys(token_set.domains))
    parts = [(name, token_set.of_domain(name), owners == name) for name in names]
    everything = [("all", token_set, np.ones(len(owners), np.bool_))] if len(names) > 1 else []
    return everything + parts


def _row(name: str, token_set: TokenSet, found: dict[str, Measurement]) -> DomainRow:
    return DomainRow(
        domain=name, documents=token_set.document_count, tokens=token_set.predicted_tokens, measurements=found
    )


def _notes(found: EvaluateResult) -> list[str]:
    return [
        f"{row.truncated} of {row.items} items of {row.task} were cut at the left to fit the context of "
        f"{row.measurements[f'accuracy/{row.task}'].conditions['context']} tokens"
        for row in found.tasks
        if row.truncated
    ]


def _load(model: Model | str | Path) -> Model:
    return model if isinstance(model, Model) else load_any(model)


def _name(model: Model | str | Path) -> str:
    return str(model) if not isinstance(model, Model) else str(model.path or model.config.family)
