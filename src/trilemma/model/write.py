"""Writing a model back as a Hugging Face style folder, and the hash that names a model's content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError, OutputError
from trilemma.model.families import FAMILIES
from trilemma.model.families.place import Place
from trilemma.model.model import Model
from trilemma.model.plain import PlainDtype, PlainMatrix, f32_to_bf16
from trilemma.model.safetensors import Planned, write_safetensors
from trilemma.model.sources import CheckpointSource
from trilemma.model.tokenizer import tokenizer_files

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model",
)  # fmt: skip
_SAFETENSORS_DTYPE = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_TORCH_DTYPE = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def write_checkpoint(
    model: Model, folder: str | Path, *, dtype: PlainDtype | None = None, overwrite: bool = False
) -> Path:
    """Write config.json, model.safetensors and copies of the tokenizer's files, a tensor at a time.

    Everything is written to a folder beside and renamed, so that `folder` is whole or absent.

    Args:
        model: quantized matrices are written as the values they stand for.
        dtype: of every tensor; None keeps each tensor's own (f32 for a quantized one).
        overwrite: replace an existing folder; else it must be absent or empty.

    Raises:
        OutputError: the folder has content, or can not be written (a full disk).
        UnsupportedModelError: the family's config.json can not say what this model is.
    """
    config = FAMILIES.get(model.config.family).write_config(model.config)
    config["torch_dtype"] = _TORCH_DTYPE[dtype or _main_dtype(model)]
    return write_folder(model, folder, config, plain_tensors(model, dtype), overwrite=overwrite)


def write_folder(
    model: Model, folder: str | Path, config: dict[str, Any], tensors: Iterable[Planned], *, overwrite: bool = False
) -> Path:
    """Write config.json, model.safetensors and copies of the tokenizer's files; `folder` is whole or absent.

    Raises:
        OutputError: the folder has content, or can not be written (a full disk).
    """
    target = Path(folder)
    if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists and is not empty. Choose another folder or remove it first.")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _fill(model, config, partial, tensors)
        _replace(target, partial)
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise OutputError(f"Can not write {target}: {what}. Free space or choose another folder.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _fill(model: Model, config: dict[str, Any], folder: Path, tensors: Iterable[Planned]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    ends = list(model.config.eos_token_ids)
    generation: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    if model.config.bos_token_id is not None:
        generation["bos_token_id"] = model.config.bos_token_id
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    if model.path is not None and model.path.is_file():  # a GGUF file
        for name, text in tokenizer_files(model.path).items():
            (folder / name).write_text(text, encoding="utf-8")
    for name in TOKENIZER_FILES:
        if model.path is not None and (model.path / name).is_file():
            shutil.copyfile(model.path / name, folder / name)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def stored_together(model: Model) -> dict[str, dict[str, Place]]:
    """Stored name -> canonical name -> its place, for every stored tensor: the parts of a fused one together."""
    family = FAMILIES.get(model.config.family)
    together: dict[str, dict[str, Place]] = {}
    for name in model.config.tensor_shapes():
        place = family.place(name, model.config)
        together.setdefault(place.name, {})[name] = place
    return together


def plain_tensors(
    model: Model, dtype: PlainDtype | None, only: Mapping[str, Mapping[str, Place]] | None = None
) -> Iterator[Planned]:
    """What to write as floating point: the parts of a fused tensor come together, in the widest of their dtypes.

    Args:
        dtype: None: each tensor's own, f32 for a quantized one.
        only: some of `stored_together`, None: all.
    """
    shapes = model.config.tensor_shapes()
    for stored_name, places in (stored_together(model) if only is None else only).items():
        found = {dtype or _plain_dtype(model, name) for name in places}
        chosen = found.pop() if len(found) == 1 else "f32"
        name, place = next(iter(places.items()))
        shape = place.stored_shape(shapes[name])
        yield Planned(
            stored_name, _SAFETENSORS_DTYPE[chosen], shape,
            lambda places=places, shape=shape, chosen=chosen: _fused(model, places, shape, chosen),  # type: ignore[misc]
        )  # fmt: skip


def _fused(model: Model, places: Mapping[str, Place], shape: tuple[int, ...], dtype: PlainDtype) -> NDArray[Any]:
    """A stored tensor, put together from its parts."""
    parts = {name: _values(model, name, place, dtype) for name, place in places.items()}
    if len(parts) == 1 and not any(place.rows or place.transposed for place in places.values()):
        return next(iter(parts.values()))
    whole = np.empty(shape, dtype=next(iter(parts.values())).dtype)
    for name, part in parts.items():
        places[name].put(part, whole)
    return whole


def _values(model: Model, name: str, place: Place, dtype: PlainDtype) -> NDArray[Any]:
    stored = model.stored(name)
    if isinstance(stored, PlainMatrix) and stored.dtype == dtype:
        return stored.bits
    values = _less(model, name, place.add) if place.add else model.tensor(name)
    if dtype == "bf16":
        return f32_to_bf16(values)
    if dtype == "f16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise CheckpointError(f"Tensor '{name}' has values beyond the range of f16. Write bf16 or f32 instead.")
    return values.astype(np.float16) if dtype == "f16" else values


def _less(model: Model, name: str, added: float) -> NDArray[np.float32]:
    """A vector less the constant that reading added; what nobody changed comes from the file, without loss."""
    if name not in model.replaced and isinstance(model.source, CheckpointSource):
        found = model.source.as_stored(name)
        if isinstance(found, np.ndarray):
            return found
    return model.tensor(name) - np.float32(added)


def _plain_dtype(model: Model, name: str) -> PlainDtype:
    found = model.format_of(name)
    return found if found in get_args(PlainDtype) else "f32"  # type: ignore[return-value]


def _main_dtype(model: Model) -> PlainDtype:
    return _plain_dtype(model, "embedding.weight")


def _replace(target: Path, partial: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.unlink()


def model_hash(model: Model | str | Path) -> str:
    """16 hex digits of a SHA-256 over the config and the bytes of every tensor.

    The files behind a checkpoint are hashed as they are; tensors that a technique replaced are hashed by value.
    """
    if not isinstance(model, Model):
        from trilemma.model.checkpoint import read_checkpoint

        model = read_checkpoint(model)
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    digest.update(json.dumps([model.run.model_dump(), {k: v.model_dump() for k, v in model.linears.items()}]).encode())
    files = getattr(model.source, "files", None)
    if files is not None:
        for path in files:
            digest.update(path.name.encode())
            _update_from_file(digest, path)
    elif getattr(model.source, "random", False):
        digest.update(f"random {model.source.seed} {model.source.dtype}".encode())  # type: ignore[attr-defined]
    for name in model.replaced if files is not None or getattr(model.source, "random", False) else model.names():
        digest.update(f"{name} {model.format_of(name)}".encode())
        digest.update(np.ascontiguousarray(model.tensor(name)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _update_from_file(digest: hashlib._Hash, path: Path) -> None:
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"Can not read {path}: {error.strerror or error}.") from None
