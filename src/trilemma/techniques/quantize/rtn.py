"""Round-to-nearest: every matrix to its grid on its own, without data. The baseline of all quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from trilemma.core.errors import RecipeError
from trilemma.formats.grid import Format
from trilemma.formats.pack import PackedMatrix, join_rows, pack
from trilemma.formats.plain import to_plain
from trilemma.formats.quantize import ScaleRule, quantize_rtn
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.model.plain import PlainDtype, PlainMatrix
from trilemma.techniques.quantize.assignment import WeightSettings, assign_formats, assign_runs, fallbacks, named
from trilemma.techniques.stored import row_parts, row_reader
from trilemma.techniques.technique import Build, report

_BLOCK_VALUES = 1 << 24  # of a matrix that are f32 at the same time
ScaleChoice = Literal["auto", "absmax", "mse"]


class RtnSettings(WeightSettings):
    """Settings of `rtn`."""

    scale: ScaleChoice = Field(
        "auto", description="how scales are found: absmax, mse (least squared error) or auto (mse below 8 bits)"
    )


class RoundToNearest:
    """Quantize every matrix on its own."""

    name: ClassVar[str] = "rtn"
    what: ClassVar[str] = "round weights to the nearest value of their grid; needs no data"
    Settings: ClassVar[type[RtnSettings]] = RtnSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return None

    def needs_calibration(self, settings: RtnSettings) -> bool:
        return False

    def apply(self, model: Model, settings: RtnSettings, build: Build) -> Model:
        formats = assign_formats(model.config, settings)
        if note := fallbacks(model.config, settings, formats):
            report(build, 0, len(formats), note)
        replaced = {}
        for done, (name, spec) in enumerate(formats.items()):
            report(build, done, len(formats), f"rtn {name}")
            replaced[name] = round_stored(name, model.stored(name), spec, settings.scale)
        report(build, len(formats), len(formats), "rtn")
        return model.with_tensors(replaced, assign_runs(model.config, formats, settings.activations))


def round_matrix(name: str, values: Float32, spec: Format, scale: ScaleChoice = "auto") -> PackedMatrix | PlainMatrix:
    """One matrix (out, in) in its format, packed. Raises RecipeError naming the tensor."""
    try:
        if spec.floating:
            return to_plain(values, plain_dtype(spec))
        return pack(quantize_rtn(values, spec, scale=scale_rule(spec, scale)))
    except RecipeError as error:
        raise named(name, error) from None


def round_ends(model: Model, formats: Mapping[str, Format], build: Build) -> dict[str, PackedMatrix | PlainMatrix]:
    """Every matrix of `formats` outside layers: embedding, head, learned positions. Raises RecipeError."""
    found = {}
    for name in (name for name in formats if not name.startswith("layers.")):
        report(build, 0, len(model.config.layers), f"rtn {name}")
        found[name] = round_stored(name, model.stored(name), formats[name])
    return found


def round_stored(
    name: str, stored: Float32 | StoredMatrix, spec: Format, scale: ScaleChoice = "auto"
) -> PackedMatrix | PlainMatrix:
    """`round_matrix` of a matrix as a model keeps it, of which a part at a time becomes f32."""
    if spec.floating:
        if isinstance(stored, PlainMatrix) and stored.format == spec.name:
            return stored
        return round_matrix(name, stored if isinstance(stored, np.ndarray) else stored.dequantize(), spec)
    rows = row_reader(stored)

    def rounded(part: slice) -> PackedMatrix:
        found = round_matrix(name, rows(part), spec, scale)
        assert isinstance(found, PackedMatrix)
        return found

    return join_rows([rounded(part) for part in row_parts(stored.shape, _BLOCK_VALUES)])


def scale_rule(spec: Format, choice: ScaleChoice) -> ScaleRule:
    """'auto' searches where it pays: below 8 bits."""
    if choice == "auto":
        return "mse" if spec.bits < 8 else "absmax"
    return choice


def plain_dtype(spec: Format) -> PlainDtype:
    dtypes: dict[str, PlainDtype] = {"f32": "f32", "f16": "f16", "bf16": "bf16"}
    return dtypes[spec.name]
