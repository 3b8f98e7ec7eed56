"""Quality of one model on the user's texts, by domain; against a reference also what changed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.core.environment import read_environment
from trilemma.core.errors import DataError, InputError
from trilemma.core.measurement import Measurement
from trilemma.data.documents import Document, Prepare, read_documents
from trilemma.data.windows import TokenSet, make_windows
from trilemma.formats.artifact import load_any
from trilemma.measure.quality.figures import likelihood, score, summarize, token_documents, token_likelihood
from trilemma.measure.quality.reference_store import Progress, Reference
from trilemma.measure.results import DomainRow, EvaluateResult
from trilemma.model.model import Model, RunSettings
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions

DEFAULT_CONTEXT = 2048
DEFAULT_TOKENS = 30_000

Paths = str | Path | Sequence[str | Path]


def evaluate(
    model: Model | str | Path,
    data: Paths | Mapping[str, Paths],
    *,
    reference: Model | str | Path | None = None,
    context: int | None = None,
    max_tokens: int | None = DEFAULT_TOKENS,
    prepare: Prepare = "none",
    runtime: str = "native",
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> EvaluateResult:
    """Perplexity and bits per byte with intervals over documents; with a reference also paired figures.

    Args:
        model: a model, or a path of one.
        data: text files, or domain -> text files.
        reference: the unmodified model; adds ppl_increase, kl_mean, kl_p99, kl_p999 and top1_agreement.
        context: tokens a window; the model's own up to 2048 by default.
        max_tokens: for each domain, spread evenly over its documents; None takes all.
        prepare: 'book' or 'none', see `data.read_documents`.
        runtime, options: how the model is run.

    Raises:
        DataError: texts that can not be used. CheckpointError: the model has no tokenizer.
        InputError: a context longer than the model's.
    """
    found = evaluate_all(
        [model], data, reference=reference, context=context, max_tokens=max_tokens, prepare=prepare, runtime=runtime,
        options=options, progress=progress,
    )  # fmt: skip
    return found[0]


def evaluate_all(
    models: Sequence[Model | str | Path],
    data: Paths | Mapping[str, Paths],
    *,
    reference: Model | str | Path | None = None,
    context: int | None = None,
    max_tokens: int | None = DEFAULT_TOKENS,
    prepare: Prepare = "none",
    runtime: str = "native",
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> list[EvaluateResult]:
    """`evaluate` for several models on the same text; the reference is run once.

    With a reference all models are scored on the same tokens, the first one's; without, each reads the text
    with its own tokenizer.

    Raises:
        InputError: no model. EngineError: with a reference, a model of another vocabulary. Else as `evaluate`.
    """
    if not models:
        raise InputError("There is no model to evaluate. Give at least one.")
    loaded = [_load(model) for model in models]
    length = min(choose_context(model, context) for model in loaded)
    chosen = (options or EngineOptions()).model_copy(update={"max_context": length})
    notes: list[str] = []
    if reference is None:
        sets = [read_token_set(model, data, length, max_tokens, prepare) for model in loaded]
        measured = [_alone(model, texts, runtime, chosen, progress) for model, texts in zip(loaded, sets, strict=True)]
    else:
        token_set = read_token_set(loaded[0], data, length, max_tokens, prepare)
        measured, notes = _paired(loaded, _load(reference), token_set, runtime, chosen, progress)
    return [
        EvaluateResult(
            model=_name(model), reference=None if reference is None else _name(reference), context=length,
            prepare=prepare, environment=read_environment(isa=isa, threads=threads), rows=tuple(rows),
            notes=tuple(notes),
        )
        for model, (rows, isa, threads) in zip(models, measured, strict=True)
    ]  # fmt: skip


def choose_context(model: Model, asked: int | None) -> int:
    """Tokens a window. Raises InputError when more was asked for than the model has."""
    if asked is not None and asked > model.config.max_context:
        raise InputError(
            f"A context of {asked} is longer than the model's {model.config.max_context}. Ask for at most that."
        )
    return asked or min(DEFAULT_CONTEXT, model.config.max_context)


def read_token_set(
    model: Model, data: Paths | Mapping[str, Paths], context: int, max_tokens: int | None, prepare: Prepare
) -> TokenSet:
    """Windows of the texts in the model's own tokens, `max_tokens` of each domain.

    Raises:
        DataError: no texts. CheckpointError: no tokenizer.
    """
    if not data:
        raise DataError("Quality needs text. Give at least one file with --data, or name=file with --domain.")
    if model.path is None:
        raise InputError("This model came from no folder, so it has no tokenizer; quality of text needs one.")
    tokenizer = Tokenizer.load(model.path)
    if isinstance(data, Mapping):
        documents = [item for name, paths in data.items() for item in read_documents(paths, name, prepare=prepare)]
    else:
        documents = read_documents(data, prepare=prepare)
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    sets = [
        make_windows(texts, tokenizer.encode_plain, context, max_tokens, decode=tokenizer.decode)
        for texts in by_domain.values()
    ]
    return TokenSet.joined(sets)


def build_reference(
    base: Model, token_set: TokenSet, folder: str | Path, *, runtime: str = "native",
    options: EngineOptions | None = None, key: str = "", progress: Progress | None = None,
) -> Reference:  # fmt: skip
    """The checkpoint's own weights in f32 arithmetic with an f32 cache, as `Reference`.

    The engine is `runtime`, or 'torch' for those that compute in 16 bits.
    """
    chosen = (options or EngineOptions()).model_copy(update={"kv_cache": "f32", "max_context": token_set.context})
    plain = base.with_run(RunSettings(kv_cache="f32"))
    engine = open_engine(plain, runtime=runtime.removesuffix("-f16").removesuffix("-bf16"), options=chosen)
    try:
        return Reference.build(engine, token_set, folder, key=key, progress=progress)
    finally:
        engine.close()


def _alone(
    model: Model, token_set: TokenSet, runtime: str, options: EngineOptions, progress: Progress | None
) -> tuple[list[DomainRow], str, int]:
    engine = open_engine(model, runtime=runtime, options=options)
    try:
        nll = token_likelihood(engine, token_set, progress)
    finally:
        engine.close()
    rows = [_row(name, part, likelihood(nll[chosen], part)) for name, part, chosen in _by_domain(token_set)]
    return rows, engine.isa, engine.threads


def _paired(
    models: Sequence[Model], base: Model, token_set: TokenSet, runtime: str, options: EngineOptions,
    progress: Progress | None,
) -> tuple[list[tuple[list[DomainRow], str, int]], list[str]]:  # fmt: skip
    measured = []
    with tempfile.TemporaryDirectory(prefix="trilemma-reference-") as folder:
        reference = build_reference(base, token_set, folder, runtime=runtime, options=options, progress=progress)
        parts = _by_domain(reference.token_set)
        for model in models:
            engine = open_engine(model, runtime=runtime, options=options)
            try:
                scores = score(engine, reference, progress)
            finally:
                engine.close()
            rows = [
                _row(name, part, summarize(scores.rows(chosen), part, reference.nll[chosen], reference.engine_name))
                for name, part, chosen in parts
            ]
            measured.append((rows, engine.isa, engine.threads))
        return measured, list(reference.notes)


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


def _load(model: Model | str | Path) -> Model:
    return model if isinstance(model, Model) else load_any(model)


def _name(model: Model | str | Path) -> str:
    return str(model) if not isinstance(model, Model) else str(model.path or model.config.family)
