"""Writing an artifact: a tensor at a time into a folder beside its place, which is then renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import OutputError
from trilemma.core.recipe import Recipe
from trilemma.formats import FORMATS
from trilemma.formats.artifact_record import (
    COPIED_FILES,
    RECIPE_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    ArtifactRecord,
    TensorRecord,
    blob_specs,
    part_of,
    stored_format,
)
from trilemma.formats.blobs import BlobWriter
from trilemma.formats.grid import QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, pack
from trilemma.formats.plain import to_plain
from trilemma.model.model import Model
from trilemma.model.plain import PlainDtype, PlainMatrix
from trilemma.model.tokenizer import tokenizer_files


def check_output(folder: str | Path, *, force: bool = False) -> Path:
    """Say early whether an artifact may be written there: absent, empty, or an artifact before.

    Raises:
        OutputError: it is a file, or a folder with other content (whatever `force`, which only
            allows replacing an existing artifact; without it that too is refused).
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise OutputError(f"'{path}' is a file. Give a folder that does not exist yet.")
    if path.is_dir() and any(path.iterdir()):
        if not (path / RECORD_FILE).is_file():
            raise OutputError(
                f"'{path}' is not empty and holds no artifact ({RECORD_FILE}). Give another folder, or empty this one."
            )
        if not force:
            raise OutputError(f"'{path}' holds an artifact already. Give another folder, or --force to replace it.")
    return path


def write_artifact(model: Model, folder: str | Path, recipe: Recipe) -> None:
    """Write a model, a tensor at a time; an artifact that was there before is replaced.

    Raises:
        OutputError: the place is taken by something else, or the disk is full or read-only;
            what was there is then untouched.
    """
    path = check_output(folder, force=True)
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_files(model, partial, recipe)
        replace_folder(partial, path)
    except OSError as error:
        raise OutputError(
            f"Can not write '{path}': {error.strerror or error}. Nothing was changed; "
            "free space or choose another place."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(model: Model, folder: Path, recipe: Recipe) -> None:
    tensors, digest = write_tensors(model, model.names(), folder / WEIGHTS_FILE)
    record = ArtifactRecord(
        config=model.config, run=model.run, weights_sha256=digest, recipe_hash=recipe.hash,
        tensors=tensors,
    )  # fmt: skip
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    if model.path is None:
        return
    if model.path.is_file():  # a GGUF file
        for name, text in tokenizer_files(model.path).items():
            (folder / name).write_text(text, encoding="utf-8")
    for name in COPIED_FILES:
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, folder / name)


def write_tensors(model: Model, names: Iterable[str], path: Path) -> tuple[dict[str, TensorRecord], str]:
    """Write tensors of a model to one file, one at a time; returns their records and the file's SHA-256."""
    every = model.config.tensor_shapes()
    shapes = {name: every[name] for name in names}
    formats = {name: stored_format(model, name) for name in shapes}
    specs = {name: blob_specs(name, formats[name], shapes[name]) for name in shapes}
    writer = BlobWriter(path, [blob for blobs in specs.values() for blob in blobs])
    records: dict[str, TensorRecord] = {}
    try:
        for name, blobs in specs.items():
            for blob, values in zip(blobs, _arrays(model, name, formats[name]), strict=True):
                writer.write(blob.name, values)
            digests = {part_of(name, blob.name): writer.digests[blob.name] for blob in blobs}
            records[name] = TensorRecord(
                format=formats[name], layout=FORMATS.get(formats[name]).layout, shape=shapes[name],
                run=model.linears.get(name), blobs=digests,
                crc32={part_of(name, blob.name): writer.crcs[blob.name] for blob in blobs},
            )  # fmt: skip
        return records, writer.close()
    except BaseException:
        writer.abandon()
        raise


def _arrays(model: Model, name: str, format_name: str) -> Iterator[NDArray[Any]]:
    spec = FORMATS.get(format_name)
    if spec.floating:
        yield _floating(model, name, format_name)
        return
    stored = model.stored(name)
    packed = pack(stored) if isinstance(stored, QuantizedMatrix) else stored
    assert isinstance(packed, PackedMatrix), f"{name}: {type(packed).__name__} is no packed matrix"
    yield from packed.parts().values()


def _floating(model: Model, name: str, format_name: str) -> NDArray[Any]:
    stored = model.stored(name)
    if isinstance(stored, PlainMatrix) and stored.format == format_name:
        return stored.bits
    values = model.tensor(name)
    if values.ndim == 1:
        return np.ascontiguousarray(values, dtype=np.float32)
    dtypes: dict[str, PlainDtype] = {"f32": "f32", "f16": "f16", "bf16": "bf16"}
    return to_plain(values, dtypes[format_name]).bits


def replace_folder(partial: Path, path: Path) -> None:
    """Put `partial` in the place of `path`; a folder that was there is moved aside first, then removed."""
    if not path.exists():
        partial.rename(path)
        return
    aside = path.with_name(path.name + ".replaced")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    try:
        partial.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)
