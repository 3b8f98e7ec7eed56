"""compressed-tensors, for transformers and vLLM: a checkpoint folder whose config.json says how weights are stored.

Codes and scales go out bit for bit (see `formats/compressed_tensors`). The embedding and the head are kept in 16 bits,
since vLLM reads quantized ones in few models. Left out: models of experts, whose tensors the readers fuse each in a
way of its own, and zero points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import OutputError, RecipeError, UnsupportedModelError
from trilemma.export import ExportReport
from trilemma.formats import FORMATS
from trilemma.formats.artifact_record import RECORD_FILE, weights_bytes
from trilemma.formats.compressed_tensors import (
    FITTING_FORMATS,
    Scheme,
    fitted,
    nearest_scheme,
    part_values,
    scheme_of,
    stored_parts,
)
from trilemma.formats.grid import QuantizedMatrix
from trilemma.model.config import Experts
from trilemma.model.families import FAMILIES
from trilemma.model.families.place import Place
from trilemma.model.model import LinearRun, Model, RunSettings
from trilemma.model.safetensors import Planned
from trilemma.model.write import plain_tensors, stored_together, write_folder

_TOGETHER = ({"q", "k", "v"}, {"gate", "up"})  # what vLLM makes one product of


@dataclass(frozen=True)
class _Matrix:
    """A stored matrix: `places` has the canonical one, or the parts of a fused one."""

    name: str
    scheme: Scheme
    places: Mapping[str, Place]
    shape: tuple[int, int]

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


def export_compressed_tensors(model: Model, path: str | Path, *, requantize: bool = False) -> ExportReport:
    """Write a model as a folder in the compressed-tensors form, a tensor at a time.

    Args:
        requantize: store formats that it lacks in 8 bits in groups of 32 instead of refusing them; the report states
            the error.

    Raises:
        UnsupportedModelError: a structure that the family's config.json, or this form, can not express.
        RecipeError: a format that does not fit, and no `requantize`.
        OutputError: the folder can not be written, or holds something else than such an export.
    """
    _check_folder(Path(path))
    config = FAMILIES.get(model.config.family).write_config(model.config)
    together = stored_together(model)
    matrices = _plan(model, together, requantize)
    rounded = {name: places for name, places in together.items() if name not in matrices and _packed(model, places)}
    kept = {name: places for name, places in together.items() if name not in matrices and name not in rounded}
    planned = [*plain_tensors(model, None, kept), *plain_tensors(model, "f16", rounded)]
    types = Counter(item.dtype for item in planned) + Counter(item.scheme.label for item in matrices.values())
    errors: dict[str, float] = {}
    for matrix in matrices.values():
        planned += _parts(model, matrix, errors)
    config["torch_dtype"] = "float16"  # scales are f16
    if matrices:
        config["quantization_config"] = _quantization(matrices, _ignored(model, together, matrices))
    folder = write_folder(model, path, config, planned, overwrite=True)
    lost = {name: _rounding(model.tensor(name)) for places in rounded.values() for name in places}
    return ExportReport(
        path=str(path), bytes=sum(file.stat().st_size for file in folder.iterdir()),
        tensor_bytes=sum(item.nbytes for item in planned), source_bytes=weights_bytes(model), types=dict(types),
        lossless=not any((errors | lost).values()), notes=tuple(_notes(model, matrices, errors, lost)),
    )  # fmt: skip


def _check_folder(path: Path) -> None:
    """Raise OutputError where writing would replace what is no export."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    config = path / "config.json"
    try:
        written = '"compressed-tensors"' in config.read_text(encoding="utf-8") and not (path / RECORD_FILE).exists()
    except (OSError, UnicodeDecodeError):
        written = False
    if not written:
        raise OutputError(f"'{path}' holds something else than an export. Give another folder, or empty this one.")


def _plan(model: Model, together: Mapping[str, Mapping[str, Place]], requantize: bool) -> dict[str, _Matrix]:
    """Stored name -> the quantized matrices inside layers."""
    shapes, found = model.config.tensor_shapes(), {}
    for name, places in together.items():
        first = next(iter(places))
        if not first.startswith("layers.") or not _packed(model, places):
            continue
        _require_linear(model, places)
        schemes = {_scheme(model, part, shapes[part][1], requantize) for part in places}
        if len(schemes) > 1:
            raise RecipeError(
                f"'{name}' is one matrix there, but its parts {', '.join(places)} have different formats here. "
                "Compress them into one format."
            )
        rows, columns = next(iter(places.values())).stored_shape(shapes[first])
        found[name] = _Matrix(name, schemes.pop(), places, (rows, columns))
    return found


def _packed(model: Model, places: Mapping[str, Place]) -> bool:
    """Whether one of these tensors is quantized."""
    return any(not FORMATS.get(model.format_of(name)).floating for name in places)


def _require_linear(model: Model, places: Mapping[str, Place]) -> None:
    """Raise UnsupportedModelError unless the readers have a linear module there that computes what is computed here."""
    name, place = next(iter(places.items()))
    if isinstance(model.config.layers[int(name.split(".")[1])].ffn, Experts) and ".ffn." in name:
        raise UnsupportedModelError(f"'{name}' belongs to experts, which this form is not written for. Export GGUF.")
    if place.transposed:
        raise UnsupportedModelError(
            f"The family '{model.config.family}' keeps '{place.name}' turned, which compressed-tensors can not "
            "quantize. Export GGUF, or leave the matrices in 16 bits."
        )
    for part in places:
        if model.linear(part).model_copy(update={"activation": "f32"}) != LinearRun():
            raise UnsupportedModelError(f"'{part}' runs in a way that compressed-tensors can not say. Export GGUF.")


def _scheme(model: Model, name: str, columns: int, requantize: bool) -> Scheme:
    format_name = model.format_of(name)
    found = scheme_of(FORMATS.get(format_name), columns, int8_inputs=_int8_inputs(model, name))
    if found is not None:
        return found
    if not requantize:
        raise RecipeError(
            f"Tensor '{name}' ({columns} columns) has the format '{format_name}', which compressed-tensors can not "
            f"hold without loss. These fit: {', '.join(FITTING_FORMATS)}. Compress into one of them, or export with "
            "requantize."
        )
    return nearest_scheme(columns)


def _int8_inputs(model: Model, name: str) -> bool:
    return model.linear(name).activation.startswith("int8")


def _parts(model: Model, matrix: _Matrix, errors: dict[str, float]) -> Iterator[Planned]:
    """What to write of one matrix; `errors` gets the relative errors of tensors that are rounded again."""
    held: list[QuantizedMatrix] = []

    def load(part: str) -> NDArray[Any]:
        if part == "weight_shape":
            return np.asarray(matrix.shape, np.int64)
        if not held:
            held.append(_fused(model, matrix, errors))
        values = part_values(held[0], matrix.scheme, part)
        if part == "weight_scale":  # the last one that needs it
            held.clear()
        return values

    for part, (dtype, shape) in stored_parts(matrix.scheme, matrix.shape).items():
        yield Planned(f"{matrix.module}.{part}", dtype, shape, partial(load, part))


def _fused(model: Model, matrix: _Matrix, errors: dict[str, float]) -> QuantizedMatrix:
    """The stored matrix put together from its parts' rows."""
    found = {}
    for name in matrix.places:
        stored = model.stored(name)
        found[name] = fitted(stored, matrix.scheme)
        if matrix.scheme.requantized is not None:
            wanted = model.tensor(name)
            errors[name] = _relative_error(found[name].dequantize(), wanted)
    if len(found) == 1:
        return next(iter(found.values()))
    first = next(iter(found.values()))
    codes = np.empty(matrix.shape, np.int8)
    scales = np.empty((matrix.shape[0], first.scales.shape[1]), np.float16)
    for name, place in matrix.places.items():
        place.put(found[name].codes, codes)
        place.put(found[name].scales, scales)
    return QuantizedMatrix(first.spec, codes, scales)


def _relative_error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Root of the mean squared error, as a share of the root of the mean square."""
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))


def _rounding(values: NDArray[np.float32]) -> float:
    return _relative_error(values.astype(np.float16).astype(np.float32), values)


def _ignored(model: Model, together: Mapping[str, Mapping[str, Place]], matrices: Mapping[str, _Matrix]) -> list[str]:
    """Linear modules that are not quantized; transformers calls every head lm_head, whatever its tensor's name."""
    shapes = model.config.tensor_shapes()
    plain = [
        name.removesuffix(".weight")
        for name, places in together.items()
        if name not in matrices and all(part.startswith("layers.") and len(shapes[part]) == 2 for part in places)
    ]
    head = FAMILIES.get(model.config.family).place("head.weight", model.config).name
    return [*plain, *dict.fromkeys([head.removesuffix(".weight"), "lm_head"])]


def _quantization(matrices: Mapping[str, _Matrix], ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json: one group for all linear modules, or one for every scheme, by name."""
    modules: dict[Scheme, list[str]] = {}
    for matrix in matrices.values():
        modules.setdefault(replace(matrix.scheme, requantized=None), []).append(matrix.module)
    groups = {
        f"group_{number}": {"targets": ["Linear"] if len(modules) == 1 else names, **scheme.config()}
        for number, (scheme, names) in enumerate(modules.items())
    }
    formats = {scheme.compression for scheme in modules}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _notes(
    model: Model, matrices: Mapping[str, _Matrix], errors: Mapping[str, float], lost: Mapping[str, float]
) -> Iterator[str]:
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        yield f"{len(errors)} tensors were stored again with loss (relative error at most {errors[worst]:.2%}, {worst})"
    for name, error in lost.items():
        yield f"{name} is kept in f16, since the readers expect 16 bits (relative error {error:.3%})"
    inputs = Counter(
        matrix.scheme.compression for matrix in matrices.values() for name in matrix.places if _int8_inputs(model, name)
    )
    if inputs["pack-quantized"]:
        yield f"{inputs['pack-quantized']} products round their inputs to int8 here and keep 16 bits there"
    if inputs["int-quantized"]:
        yield f"{inputs['int-quantized']} products scale int8 inputs for every 32 columns here and for a token there"
    if matrices:
        yield "scales are f16: load in float16, as config.json says, or in float32; bfloat16 rounds them"
    split = _split_products(model, matrices)
    if split:
        yield f"vLLM makes one product of matrices that have different formats here and refuses them: {split}"
    if model.run.kv_cache != RunSettings().kv_cache:
        yield f"the KV cache in {model.run.kv_cache} is not part of this form: ask the reader for it"


def _split_products(model: Model, matrices: Mapping[str, _Matrix]) -> str:
    """The first product of vLLM's whose parts have different schemes, or are not all quantized."""
    schemes = {name: matrix.scheme for matrix in matrices.values() for name in matrix.places}
    found: dict[str, set[Scheme | None]] = {}
    for name, shape in model.config.tensor_shapes().items():
        block, _, role = name.removesuffix(".weight").rpartition(".")
        for roles in _TOGETHER:
            if role in roles and len(shape) == 2:
                found.setdefault(f"{block}.{{{', '.join(sorted(roles))}}}", set()).add(schemes.get(name))
    return next((product for product, kinds in found.items() if len(kinds) > 1), "")
