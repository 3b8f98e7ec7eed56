"""Calibration windows cut from text, and the record that lets a recipe find the very same ones again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import DataError, RecipeError
from trilemma.core.recipe import Calibration
from trilemma.data.calibration import sample_calibration
from trilemma.data.documents import Document, Prepare, read_documents
from trilemma.data.split import hold_out, split_documents
from trilemma.data.text_source import TextSource, read_sources, weights_of, with_weights
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer

CALIBRATION_WINDOWS = 128
CALIBRATION_CONTEXT = 512
Part = Literal["all", "calibrate", "train"]
CALIBRATION_PART: Part = "calibrate"
TRAINING_PART: Part = "train"


def calibration_windows(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    context: int,
    *,
    seed: int,
    part: Part,
    prepare: Prepare,
    windows: int = CALIBRATION_WINDOWS,
    sources: Sequence[TextSource] = (),
) -> tuple[NDArray[np.int32], Calibration]:
    """(windows, context) int32 tokens and their record.

    Args:
        sources: the files of the documents, for their weights.

    Raises:
        DataError: not enough text for one window.
    """
    length = min(CALIBRATION_CONTEXT, context)
    found = sample_calibration(
        documents, tokenizer.encode, length, windows, seed, encode_chat=tokenizer.encode_plain, sources=sources
    )
    record = Calibration(
        part=part, windows=windows, context=length, seed=seed, prepare=prepare, weights=weights_of(sources),
        sha256=hashlib.sha256(found.tobytes()).hexdigest()[:16],
    )  # fmt: skip
    return found, record


def read_calibration(
    model: Model,
    data: Sequence[str | Path],
    seed: int,
    *,
    record: Calibration | None = None,
    prepare: Prepare = "none",
) -> tuple[NDArray[np.int32], Calibration]:
    """Calibration windows cut from text files with the model's own tokenizer.

    Args:
        data: files, with field and weight where they have one; see `data.text_source`.
        record: of a recipe that is replayed: the same part, count, length and seed are used, and the
            tokens must come out the same.

    Raises:
        CheckpointError: the model has no tokenizer.
        DataError: the texts can not be used, or are not those that the recipe was made with.
    """
    if model.path is None:
        raise RecipeError("The model has no folder and so no tokenizer. Give `calibration` windows instead of `data`.")
    tokenizer = Tokenizer.load(model.path)
    how = prepare if record is None else record.prepare
    sources = read_sources(data)
    if record is not None:
        sources = with_weights(sources, record.weights)
    documents = read_documents(sources, prepare=how, render=tokenizer.transcript)
    if record is None:
        context = min(CALIBRATION_CONTEXT, model.config.max_context)
        return calibration_windows(documents, tokenizer, context, seed=seed, part="all", prepare=how, sources=sources)
    if record.part == CALIBRATION_PART:
        documents = split_documents(documents, record.seed).calibrate
    elif record.part == TRAINING_PART:
        documents = hold_out(documents, record.seed)[0]
    found, made = calibration_windows(
        documents,
        tokenizer,
        record.context,
        seed=record.seed,
        part=record.part,
        prepare=how,
        windows=record.windows,
        sources=sources,
    )
    if made.sha256 != record.sha256:
        raise DataError(
            f"The recipe was made with other calibration text (tokens {record.sha256}, these are {made.sha256}). "
            "Give the same files, in the same order, or remove 'calibration' from the recipe to use these."
        )
    return found, made
