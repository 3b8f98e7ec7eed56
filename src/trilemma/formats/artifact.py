"""The artifact folder: what leaves Trilemma and runs again here.

    trilemma.json        schema version, decoder config, run settings, one record a tensor, checksums
    model.safetensors    the blobs (see blobs.py)
    recipe.yaml          what was done to the checkpoint
    config.json, tokenizer.json, ...   copied from the checkpoint

An artifact is written beside its place and renamed, so that a kill leaves either the old folder or
the new one. The same model and recipe give the same bytes. Tensors are read when asked for, and
each blob is checked against its SHA-256 as it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from trilemma.core.errors import CheckpointError
from trilemma.core.recipe import Recipe, explain
from trilemma.formats import FORMATS
from trilemma.formats.artifact_record import (
    READABLE_VERSIONS,
    RECIPE_FILE,
    RECORD_FILE,
    SCHEMA_VERSION,
    WEIGHTS_FILE,
    ArtifactRecord,
    TensorRecord,
    blob_specs,
    part_of,
    weights_bytes,
)
from trilemma.formats.artifact_write import check_output, replace_folder, write_artifact, write_tensors
from trilemma.formats.blobs import BlobReader
from trilemma.formats.pack import PackedMatrix, check_layout
from trilemma.model.gguf import find_gguf
from trilemma.model.located import Located
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.model.plain import PlainMatrix

__all__ = [
    "RECIPE_FILE",
    "RECORD_FILE",
    "SCHEMA_VERSION",
    "WEIGHTS_FILE",
    "ArtifactRecord",
    "ArtifactSource",
    "TensorFile",
    "TensorRecord",
    "blob_specs",
    "check_output",
    "is_artifact",
    "load_any",
    "read_artifact",
    "read_recipe",
    "replace_folder",
    "weights_bytes",
    "write_artifact",
    "write_tensors",
]


class TensorFile:
    """Reads tensors that `write_tensors` wrote, on demand.

    Raises:
        CheckpointError: the file is missing, truncated, or lacks a tensor of the records.
    """

    def __init__(self, path: Path, records: Mapping[str, TensorRecord]) -> None:
        self.path, self._records = path, records
        self._blobs = BlobReader(path)
        names = set(self._blobs.names())
        for name, tensor in records.items():
            for blob in blob_specs(name, tensor.format, tensor.shape):
                if blob.name not in names:
                    raise CheckpointError(
                        f"'{path.parent}' has no blob '{blob.name}'. The artifact is damaged: make it again."
                    )

    def stored_dtype(self, name: str) -> str:
        return self._tensor(name).format

    def read(self, name: str) -> Float32 | StoredMatrix:
        tensor = self._tensor(name)
        arrays = {
            part: self._blobs.read(blob, tensor.blobs.get(part))
            for blob in blob_specs(name, tensor.format, tensor.shape)
            for part in (part_of(name, blob.name),)
        }
        return _assemble(tensor, arrays)

    def locate(self, name: str) -> Located | None:
        """Where a matrix lies; None where the artifact has no CRC-32 of it, so that SHA-256 is what can be checked."""
        tensor = self._tensor(name)
        if len(tensor.shape) != 2 or not tensor.crc32:
            return None
        pieces = {
            part: self._blobs.locate(blob, tensor.crc32.get(part))
            for blob in blob_specs(name, tensor.format, tensor.shape)
            for part in (part_of(name, blob.name),)
        }
        encoding = "rows" if FORMATS.get(tensor.format).floating else "panels"
        shape = (tensor.shape[0], tensor.shape[1])
        return Located(encoding, tensor.format, shape, name, self.path, self._blobs.nbytes, pieces)

    def _tensor(self, name: str) -> TensorRecord:
        if name not in self._records:
            raise CheckpointError(f"The artifact has no tensor '{name}'. It is damaged: make it again.")
        return self._records[name]


class ArtifactSource(TensorFile):
    """Reads tensors of an artifact on demand."""

    random = False

    def __init__(self, folder: Path, record: ArtifactRecord) -> None:
        super().__init__(folder / WEIGHTS_FILE, record.tensors)
        self.files = [folder / RECORD_FILE, folder / WEIGHTS_FILE]


def is_artifact(folder: str | Path) -> bool:
    """Whether Trilemma wrote this folder: it has a trilemma.json."""
    return (Path(folder) / RECORD_FILE).is_file()


def read_artifact(folder: str | Path) -> Model:
    """Open an artifact; its tensors are read when asked for.

    Raises:
        CheckpointError: files missing, truncated, changed, or of a version that this release can not read.
    """
    path = Path(folder)
    record = _read_record(path)
    for name, tensor in record.tensors.items():
        if tensor.format not in FORMATS:
            raise CheckpointError(
                f"Tensor '{name}' of '{path}' has the format '{tensor.format}', which this release does not know. "
                f"It reads {', '.join(FORMATS)}: update Trilemma, or make the artifact again."
            )
        check_layout(tensor.layout)
    expected = record.config.tensor_shapes()
    found = {name: tensor.shape for name, tensor in record.tensors.items()}
    if found != expected:
        wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise CheckpointError(f"'{path}' lists other tensors than its config: {', '.join(wrong[:4])}. Make it again.")
    linears = {name: tensor.run for name, tensor in record.tensors.items() if tensor.run is not None}
    return Model(record.config, ArtifactSource(path, record), path=path, linears=linears, run=record.run)


def read_recipe(folder: str | Path) -> Recipe:
    """The recipe that made an artifact. Raises CheckpointError when it is missing, RecipeError when damaged."""
    path = Path(folder) / RECIPE_FILE
    try:
        return Recipe.from_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"Can not read '{path}': {error}. Make the artifact again.") from None


def load_any(path_or_id: str | Path) -> Model:
    """Open whatever it is: artifact, checkpoint folder, GGUF file, bare config.json (random weights), hub id.

    Raises:
        CheckpointError: nothing usable is there; the message says what was looked for.
        UnsupportedModelError: an architecture that no family reads.
    """
    from trilemma.model.checkpoint import read_checkpoint

    if is_artifact(path_or_id):
        return read_artifact(path_or_id)
    file = find_gguf(path_or_id)
    if file is not None:
        from trilemma.formats.gguf.read import read_gguf

        return read_gguf(file)
    return read_checkpoint(path_or_id)


def short_name(path_or_id: str | Path) -> str:
    """What to call a model of which this is the place: its folder's name, also for a bare config.json."""
    place = Path(path_or_id)
    return place.parent.name if place.name == "config.json" else place.name or str(path_or_id)


def _read_record(path: Path) -> ArtifactRecord:
    file = path / RECORD_FILE
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = raw.get("schema_version") if isinstance(raw, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"Can not read '{file}': {error}. Copy or make the artifact again.") from None
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"'{file}' has schema version {version!r}; this release reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}. "
            "Update Trilemma, or make the artifact again."
        )
    try:
        return ArtifactRecord.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise CheckpointError(f"'{file}' can not be read: {explain(error)[:400]}. Make the artifact again.") from None


def _assemble(tensor: TensorRecord, arrays: Mapping[str, NDArray[Any]]) -> Float32 | StoredMatrix:
    spec = FORMATS.get(tensor.format)
    if not spec.floating:
        rows, columns = tensor.shape
        return PackedMatrix(spec, (rows, columns), **{part: values.reshape(-1) for part, values in arrays.items()})
    if tensor.format == "bf16":
        return PlainMatrix("bf16", arrays["values"])
    if tensor.format == "f16":
        return PlainMatrix("f16", arrays["values"])
    return np.asarray(arrays["values"], dtype=np.float32)
