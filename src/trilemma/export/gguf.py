"""GGUF, for llama.cpp and its family: metadata, tensors and tokenizer in one file (see `formats/gguf`)."""

from __future__ import annotations

from pathlib import Path

from trilemma.export import ExportReport
from trilemma.formats.gguf.write import write_gguf
from trilemma.model.model import Model


def export_gguf(model: Model, path: str | Path, *, requantize: bool = False) -> ExportReport:
    """Write a model as one GGUF file, a tensor at a time.

    Args:
        requantize: store formats that GGUF lacks as Q8_0 (F16 where rows are no multiple of 32)
            instead of refusing them; the report states the error.

    Raises:
        UnsupportedModelError: a structure that the GGUF architecture can not express.
        RecipeError: a format that no GGUF type holds, and no `requantize`.
        MissingExtraError: the package `gguf` is not installed.
        OutputError: the file can not be written.
    """
    return ExportReport.model_validate(write_gguf(model, path, requantize=requantize).model_dump())
