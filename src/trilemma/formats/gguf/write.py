"""Writing a model as one GGUF file, for llama.cpp and its family: metadata, tensors and tokenizer.

What lies on a grid of GGUF goes out bit for bit (see blocks.py). Architectures: `llama` for the llama
and mistral families, whose q and k rows are reordered as llama.cpp wants them, `qwen2` and `qwen3`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import MissingExtraError, OutputError, RecipeError
from trilemma.core.record import Record
from trilemma.formats import FORMATS
from trilemma.formats.artifact_record import weights_bytes
from trilemma.formats.gguf.blocks import LOSSLESS_FORMATS, Target, encode_matrix, nearest_target, rope_rows, row_bytes
from trilemma.formats.gguf.blocks import target_of as type_of
from trilemma.formats.gguf.metadata import Shape, read_shape, rope_factors, write_metadata, write_vocabulary
from trilemma.formats.gguf.vocabulary import read_vocabulary
from trilemma.model.config import DecoderConfig
from trilemma.model.gguf import gguf_name
from trilemma.model.gguf.names import rope_rows_needed
from trilemma.model.model import Model
from trilemma.model.tokenizer import tokenizer_files


class GgufFile(Record):
    """What was written.

    tensor_bytes counts the tensors in the file, source_bytes what they take here; `types` maps a GGUF type to how
    many tensors have it; `notes` says what is not bit for bit, what costs more bytes and what the file can not say.
    """

    path: str
    bytes: int
    tensor_bytes: int
    source_bytes: int
    types: dict[str, int]
    lossless: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: its name, GGUF type, (out, in) or (n,) shape, and how to make its bytes."""

    name: str
    target: Target
    shape: tuple[int, ...]
    load: Callable[[], NDArray[Any]]
    values: Callable[[], NDArray[np.float32]]  # what it stands for, rows in the file's order

    @property
    def nbytes(self) -> int:
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return rows * row_bytes(self.target.type, self.shape[-1])


def write_gguf(model: Model, path: str | Path, *, requantize: bool = False) -> GgufFile:
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
    gguf = _package()
    target = Path(path)
    shape = read_shape(model.config)
    notes: list[str] = list(shape.notes)
    entries = _plan(model, shape, requantize)
    unfinished = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(None, shape.architecture, use_temp_file=False)
    _describe(gguf, writer, model, shape, notes, entries)
    try:
        errors = _write(gguf, writer, unfinished, entries)
        unfinished.replace(target)
    except OSError as error:
        raise OutputError(
            f"Can not write '{target}': {error.strerror or error}. Free space or choose another place."
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)
    return _report(model, target, entries, errors, notes)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "Exporting GGUF") from None
    return gguf


def _plan(model: Model, shape: Shape, requantize: bool) -> list[_Entry]:
    entries = []
    for name, dimensions in model.config.tensor_shapes().items():
        target = _target(model, name, dimensions, requantize)
        rows = _row_order(model.config, shape, name)
        values = partial(_values, model, name, rows)
        load = values if len(dimensions) == 1 else partial(_encoded, model, name, target, rows)
        entries.append(_Entry(gguf_name(name), target, dimensions, load, values))
    factors = rope_factors(shape)
    if factors is not None:
        entries.append(_Entry("rope_freqs.weight", Target("F32"), factors.shape, lambda: factors, lambda: factors))
    return entries


def _target(model: Model, name: str, dimensions: tuple[int, ...], requantize: bool) -> Target:
    if len(dimensions) == 1:
        return Target("F32")
    format_name = model.format_of(name)
    found = type_of(FORMATS.get(format_name), dimensions[1])
    if found is not None:
        return found
    if not requantize:
        raise RecipeError(
            f"Tensor '{name}' has the format '{format_name}', which no GGUF type holds without loss. "
            f"These do: {', '.join(LOSSLESS_FORMATS)}. Compress into one of them, or export with requantize."
        )
    return nearest_target(dimensions[1])


def _row_order(config: DecoderConfig, shape: Shape, name: str) -> NDArray[np.intp] | None:
    """llama.cpp's llama rotates neighbouring pairs: rows of q and k (and their biases) are reordered."""
    if not rope_rows_needed(shape.architecture, name):
        return None
    spec = config.layers[int(name.split(".")[1])].attention
    assert spec is not None
    return rope_rows(spec.heads if name.split(".")[3] == "q" else spec.kv_heads, spec.head_dim)


def _values(model: Model, name: str, rows: NDArray[np.intp] | None) -> NDArray[np.float32]:
    values = model.tensor(name)
    return np.ascontiguousarray(values if rows is None else values[rows], dtype=np.float32)


def _encoded(model: Model, name: str, target: Target, rows: NDArray[np.intp] | None) -> NDArray[Any]:
    return encode_matrix(model.stored(name), target, rows)


def _describe(gguf: Any, writer: Any, model: Model, shape: Shape, notes: list[str], entries: list[_Entry]) -> None:
    name = model.path.resolve().name if model.path is not None else "model"
    most = Counter(entry.target.type for entry in entries if len(entry.shape) == 2).most_common(1)[0][0]
    write_metadata(gguf, writer, shape, name=name, most=most)
    if model.path is None or "tokenizer.json" not in tokenizer_files(model.path):
        writer.add_tokenizer_model("no_vocab")
        notes.append("the model has no tokenizer.json, so the file carries no vocabulary and can not read text")
        return
    vocabulary = read_vocabulary(model.path, model.config)
    write_vocabulary(writer, vocabulary)
    notes += vocabulary.notes


def _write(gguf: Any, writer: Any, path: Path, entries: list[_Entry]) -> dict[str, float]:
    """Write header and tensors; returns the relative error of every tensor that is not exact."""
    errors = {}
    try:
        for entry in entries:
            kind = gguf.GGMLQuantizationType[entry.target.type]
            dtype = np.dtype(np.float16 if entry.target.type == "F16" else np.float32)
            writer.add_tensor_info(entry.name, entry.shape, dtype, entry.nbytes, raw_dtype=kind)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            stored = entry.load()
            assert stored.nbytes == entry.nbytes, f"{entry.name}: {stored.nbytes} bytes, announced {entry.nbytes}"
            writer.write_tensor_data(stored)
            if not entry.target.exact:
                found = gguf.dequantize(stored, gguf.GGMLQuantizationType[entry.target.type])
                errors[entry.name] = _relative_error(found.reshape(entry.shape), entry.values())
    finally:
        writer.close()
    return errors


def _relative_error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Root of the mean squared error, as a share of the root of the mean square."""
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))


def _report(model: Model, path: Path, entries: list[_Entry], errors: dict[str, float], notes: list[str]) -> GgufFile:
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        notes.append(
            f"{len(errors)} tensors were stored again with loss (relative error at most {errors[worst]:.2%}, {worst})"
        )
    for why, count in Counter(entry.target.why for entry in entries if entry.target.why).items():
        notes.append(f"{count} tensors: {why}")
    source, written = weights_bytes(model), sum(entry.nbytes for entry in entries)
    if written > source * 1.01:
        notes.append(
            f"the tensors take {written / 1e6:.2f} MB in GGUF and {source / 1e6:.2f} MB here "
            f"(+{written / source - 1:.0%}): GGUF keeps a scale for every 32 values"
        )
    return GgufFile(
        path=str(path), bytes=path.stat().st_size, tensor_bytes=written, source_bytes=source,
        types=dict(Counter(entry.target.type for entry in entries)), lossless=not errors, notes=tuple(notes),
    )  # fmt: skip
