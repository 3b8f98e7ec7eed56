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
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from trilemma.core.errors import CheckpointError, OutputError
from trilemma.core.recipe import Recipe, explain
from trilemma.core.record import Record
from trilemma.formats import FORMATS, panel16
from trilemma.formats.blobs import BlobReader, BlobSpec, BlobWriter
from trilemma.formats.grid import Format, QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, check_layout, pack
from trilemma.formats.plain import to_plain
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Float32, LinearRun, Model, RunSettings, StoredMatrix
from trilemma.model.plain import PlainDtype, PlainMatrix

SCHEMA_VERSION = 1
RECORD_FILE = "trilemma.json"
WEIGHTS_FILE = "model.safetensors"
RECIPE_FILE = "recipe.yaml"
COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip

_DTYPE = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


class TensorRecord(Record):
    """How one tensor lies in the weights file; `blobs` maps a part to its SHA-256."""

    format: str
    layout: str
    shape: tuple[int, ...]
    run: LinearRun | None = None
    blobs: dict[str, str]


class ArtifactRecord(Record):
    """The content of trilemma.json."""

    schema_version: int = SCHEMA_VERSION
    config: DecoderConfig
    run: RunSettings
    weights_sha256: str
    recipe_hash: str
    tensors: dict[str, TensorRecord]


class ArtifactSource:
    """Reads tensors of an artifact on demand."""

    random = False

    def __init__(self, folder: Path, record: ArtifactRecord) -> None:
        self._record = record
        self.files = [folder / RECORD_FILE, folder / WEIGHTS_FILE]
        self._blobs = BlobReader(folder / WEIGHTS_FILE)
        names = set(self._blobs.names())
        for name, tensor in record.tensors.items():
            for blob in blob_specs(name, tensor.format, tensor.shape):
                if blob.name not in names:
                    raise CheckpointError(
                        f"'{folder}' has no blob '{blob.name}'. The artifact is damaged: make it again."
                    )

    def stored_dtype(self, name: str) -> str:
        return self._tensor(name).format

    def read(self, name: str) -> Float32 | StoredMatrix:
        tensor = self._tensor(name)
        arrays = {
            part: self._blobs.read(blob, tensor.blobs.get(part))
            for blob in blob_specs(name, tensor.format, tensor.shape)
            for part in (_part(name, blob.name),)
        }
        return _assemble(tensor, arrays)

    def _tensor(self, name: str) -> TensorRecord:
        if name not in self._record.tensors:
            raise CheckpointError(f"The artifact has no tensor '{name}'. It is damaged: make it again.")
        return self._record.tensors[name]


def blob_specs(name: str, format_name: str, shape: tuple[int, ...]) -> list[BlobSpec]:
    """The blobs of one tensor: the tensor itself when floating, else `.codes`, `.scales` and perhaps `.minima`."""
    spec: Format = FORMATS.get(format_name)
    if spec.floating:
        return [BlobSpec(name=name, dtype=_DTYPE[format_name], shape=shape)]
    rows, columns = shape
    count = panel16.panels(rows)
    lines = panel16.codes_bytes(spec, (rows, columns)) // count // panel16.LINE_BYTES
    scales = (count, spec.groups(columns), panel16.PANEL_ROWS)
    blobs = [
        BlobSpec(name=f"{name}.codes", dtype="U8", shape=(count, lines, panel16.LINE_BYTES)),
        BlobSpec(name=f"{name}.scales", dtype="F16", shape=scales),
    ]
    return blobs if spec.symmetric else [*blobs, BlobSpec(name=f"{name}.minima", dtype="F16", shape=scales)]


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


def is_artifact(folder: str | Path) -> bool:
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
    """Open whatever it is: an artifact, a checkpoint folder, a bare config.json (random weights), a hub id.

    Raises:
        CheckpointError: nothing usable is there; the message says what was looked for.
        UnsupportedModelError: an architecture that no family reads.
    """
    from trilemma.model.checkpoint import read_checkpoint

    if is_artifact(path_or_id):
        return read_artifact(path_or_id)
    return read_checkpoint(path_or_id)


def weights_bytes(model: Model) -> int:
    """Bytes of all tensors as `write_artifact` would store them, without alignment between them."""
    shapes = model.config.tensor_shapes()
    return sum(blob.nbytes for name in shapes for blob in blob_specs(name, _format(model, name), shapes[name]))


def _read_record(path: Path) -> ArtifactRecord:
    file = path / RECORD_FILE
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = raw.get("schema_version") if isinstance(raw, dict) else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Can not read '{file}': {error}. Copy or make the artifact again.") from None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"'{file}' has schema version {version!r}; this release reads version {SCHEMA_VERSION}. "
            "Update Trilemma, or make the artifact again."
        )
    try:
        return ArtifactRecord.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise CheckpointError(f"'{file}' can not be read: {explain(error)[:400]}. Make the artifact again.") from None


def _write_files(model: Model, folder: Path, recipe: Recipe) -> None:
    tensors, digest = _write_weights(model, folder / WEIGHTS_FILE)
    record = ArtifactRecord(
        config=model.config, run=model.run, weights_sha256=digest, recipe_hash=recipe.hash,
        tensors=tensors,
    )  # fmt: skip
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    if model.path is None:
        return
    for name in COPIED_FILES:
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, folder / name)


def _write_weights(model: Model, path: Path) -> tuple[dict[str, TensorRecord], str]:
    shapes = model.config.tensor_shapes()
    formats = {name: _format(model, name) for name in shapes}
    specs = {name: blob_specs(name, formats[name], shapes[name]) for name in shapes}
    writer = BlobWriter(path, [blob for blobs in specs.values() for blob in blobs])
    records: dict[str, TensorRecord] = {}
    try:
        for name, blobs in specs.items():
            for blob, values in zip(blobs, _arrays(model, name, formats[name]), strict=True):
                writer.write(blob.name, values)
            digests = {_part(name, blob.name): writer.digests[blob.name] for blob in blobs}
            records[name] = TensorRecord(
                format=formats[name], layout=FORMATS.get(formats[name]).layout, shape=shapes[name],
                run=model.linears.get(name), blobs=digests,
            )  # fmt: skip
        return records, writer.close()
    except BaseException:
        writer.abandon()
        raise


def _format(model: Model, name: str) -> str:
    """Vectors (norms, biases) are kept in f32; a matrix as the model keeps it."""
    return model.format_of(name) if len(model.config.tensor_shapes()[name]) == 2 else "f32"


def _arrays(model: Model, name: str, format_name: str) -> Iterator[NDArray[Any]]:
    spec = FORMATS.get(format_name)
    if spec.floating:
        yield _floating(model, name, format_name)
        return
    stored = model.stored(name)
    packed = pack(stored) if isinstance(stored, QuantizedMatrix) else stored
    assert isinstance(packed, PackedMatrix), f"{name}: {type(packed).__name__} is no packed matrix"
    yield packed.codes
    yield packed.scales
    if packed.minima is not None:
        yield packed.minima


def _floating(model: Model, name: str, format_name: str) -> NDArray[Any]:
    stored = model.stored(name)
    if isinstance(stored, PlainMatrix) and stored.format == format_name:
        return stored.bits
    values = model.tensor(name)
    if values.ndim == 1:
        return np.ascontiguousarray(values, dtype=np.float32)
    dtypes: dict[str, PlainDtype] = {"f32": "f32", "f16": "f16", "bf16": "bf16"}
    return to_plain(values, dtypes[format_name]).bits


def _part(name: str, blob: str) -> str:
    return blob[len(name) + 1 :] or "values"


def _assemble(tensor: TensorRecord, arrays: Mapping[str, NDArray[Any]]) -> Float32 | StoredMatrix:
    spec = FORMATS.get(tensor.format)
    if not spec.floating:
        rows, columns = tensor.shape
        minima = arrays["minima"].reshape(-1) if "minima" in arrays else None
        return PackedMatrix(spec, (rows, columns), arrays["codes"].reshape(-1), arrays["scales"].reshape(-1), minima)
    if tensor.format == "bf16":
        return PlainMatrix("bf16", arrays["values"])
    if tensor.format == "f16":
        return PlainMatrix("f16", arrays["values"])
    return np.asarray(arrays["values"], dtype=np.float32)


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
