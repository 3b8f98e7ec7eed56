"""What an artifact folder holds: file names, the record in trilemma.json, and the blobs of each tensor."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trilemma.core.record import Record
from trilemma.formats import FORMATS, panel16
from trilemma.formats.blobs import BlobSpec
from trilemma.formats.grid import Format
from trilemma.formats.pack import blob_bytes
from trilemma.model.config import DecoderConfig
from trilemma.model.model import LinearRun, Model, RunSettings

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 has no CRC-32 of blobs
RECORD_FILE = "trilemma.json"
WEIGHTS_FILE = "model.safetensors"
RECIPE_FILE = "recipe.yaml"
COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip

_DTYPE = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


class TensorRecord(Record):
    """How one tensor lies in the weights file; `blobs` maps a part to its SHA-256, `crc32` to zlib's CRC-32."""

    format: str
    layout: str
    shape: tuple[int, ...]
    run: LinearRun | None = None
    blobs: dict[str, str]
    crc32: dict[str, Annotated[int, Field(ge=0, lt=1 << 32)]] = {}


class ArtifactRecord(Record):
    """The content of trilemma.json."""

    schema_version: int = SCHEMA_VERSION
    config: DecoderConfig
    run: RunSettings
    weights_sha256: str
    recipe_hash: str
    tensors: dict[str, TensorRecord]


def blob_specs(name: str, format_name: str, shape: tuple[int, ...]) -> list[BlobSpec]:
    """The blobs of one tensor: the tensor itself when floating, else `.codes`, `.scales` and what the grid has more."""
    spec: Format = FORMATS.get(format_name)
    if spec.floating:
        return [BlobSpec(name=name, dtype=_DTYPE[format_name], shape=shape)]
    shape = rows, columns = shape[0], shape[1]
    count = panel16.panels(rows)
    lines = panel16.codes_bytes(spec, (rows, columns)) // count // panel16.LINE_BYTES
    scales = (count, panel16.scale_groups(spec, columns), panel16.PANEL_ROWS)
    factors = (count, panel16.factor_groups(spec, columns), panel16.PANEL_ROWS)
    kinds = {"codes": ("U8", (count, lines, panel16.LINE_BYTES)), "scales": ("F16", scales), "minima": ("F16", scales),
             "sub_scales": ("I8", factors), "sub_minima": ("I8", factors)}  # fmt: skip
    return [
        BlobSpec(name=f"{name}.{part}", dtype=kinds[part][0], shape=kinds[part][1]) for part in blob_bytes(spec, shape)
    ]


def weights_bytes(model: Model) -> int:
    """Bytes of all tensors as `write_artifact` would store them, without alignment between them."""
    shapes = model.config.tensor_shapes()
    return sum(blob.nbytes for name in shapes for blob in blob_specs(name, stored_format(model, name), shapes[name]))


def stored_format(model: Model, name: str) -> str:
    """Vectors (norms, biases) are kept in f32; a matrix as the model keeps it."""
    return model.format_of(name) if len(model.config.tensor_shapes()[name]) == 2 else "f32"


def part_of(name: str, blob: str) -> str:
    return blob[len(name) + 1 :] or "values"
