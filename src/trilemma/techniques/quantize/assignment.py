"""Which matrix gets which format and which activations: settings shared by every weight quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field, field_validator

from trilemma.core.errors import RecipeError
from trilemma.formats import FORMATS, Format
from trilemma.model.config import DecoderConfig, is_router
from trilemma.model.model import Activation, LinearRun, Model
from trilemma.techniques.technique import Build, TechniqueSettings, report

# What takes the place of scales of two levels where rows do not fit them: the same bits, or the next more.
ONE_LEVEL = {
    "int2-g16-k": "nl4-g32", "int3-g16-k": "nl4-g32", "int4-g32-k": "int4-g32-asym", "int5-g32-k": "int5-g32-asym",
    "int6-g16-k": "int8-g32",
}  # fmt: skip
_SUPERGROUP = 256


class WeightSettings(TechniqueSettings):
    """Formats of the matrices, and the precision of what they are multiplied with."""

    weights: str = Field(description="format of the matrices inside layers, such as int4-g32 or int4-g32-k")
    embedding: str | None = Field(
        None,
        description="format of the embedding (and tied head); by default int8-g32 under 4-bit weights, else as weights",
    )
    head: str | None = Field(None, description="format of an untied head; by default that of the embedding")
    overrides: dict[str, str] = Field(
        default={}, description="pattern of tensor names -> format, the last match wins: 'layers.0.*': 'int8-g32'"
    )
    activations: Activation = Field(
        "int8-g32", description="input precision of quantized products: int8-g32 (A8), bf16 (A16) or f32"
    )

    @field_validator("weights", "embedding", "head")
    @classmethod
    def _known_format(cls, value: str | None) -> str | None:
        return value if value is None else known_format(value)

    @field_validator("overrides")
    @classmethod
    def _known_formats(cls, value: dict[str, str]) -> dict[str, str]:
        return {pattern: known_format(name) for pattern, name in value.items()}


def known_format(name: str) -> str:
    """The name, if it is a format's. Raises ValueError."""
    if name not in FORMATS:
        raise ValueError(f"no format is called '{name}'; valid: {', '.join(FORMATS)}")
    return name


def assign(model: Model, settings: WeightSettings, build: Build) -> tuple[dict[str, Format], dict[str, LinearRun]]:
    """Formats and runs of all matrices, and a word where they are not those asked for; errors as `assign_formats`."""
    formats = assign_formats(model.config, settings)
    if note := fallbacks(model.config, settings, formats):
        report(build, 0, len(model.config.layers), note)
    return formats, assign_runs(model.config, formats, settings.activations)


def assign_formats(config: DecoderConfig, settings: WeightSettings) -> dict[str, Format]:
    """Format of every matrix of the model, in file order.

    Routers and learned positions are never put on a grid: they are small, and errors in them go far.
    They are bf16 beside quantized matrices.

    Scales of two levels need rows that are a multiple of 256 long, as GGUF's blocks are. Shorter ones get the one-level
    format of `ONE_LEVEL`, as llama.cpp does, but not where an override asks for two levels by name.

    Raises:
        RecipeError: a pattern of `overrides` matches no matrix, or asks for a format that its rows do not fit; or
            layers have low-rank pairs, which stand beside matrices that are quantized already.
    """
    if any(layer.low_rank for layer in config.layers):
        raise RecipeError("This model is quantized and corrected by 'eora' already. Start from the unquantized model.")
    shapes = config.tensor_shapes()
    weights = FORMATS.get(settings.weights)
    small = "int8-g32" if weights.bits < 8 else weights.name
    embedding = settings.embedding or small
    ends = {"embedding.weight": embedding, "head.weight": settings.head or embedding}
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    chosen = {name: _fitting(ends.get(name, weights.name), shapes[name][1]) for name in matrices}
    for pattern, format_name in settings.overrides.items():
        matched = [name for name in matrices if fnmatchcase(name, pattern)]
        if not matched:
            raise RecipeError(
                f"The override '{pattern}' matches no matrix. Names look like "
                f"'{matrices[-1]}'; patterns like 'layers.0.*' or '*.ffn.down.weight'."
            )
        for name in matched:
            _check_fit(name, format_name, shapes[name][1])
        chosen |= dict.fromkeys(matched, format_name)
    formats = {name: FORMATS.get(format_name) for name, format_name in chosen.items()}
    bf16 = FORMATS.get("bf16")
    return {name: bf16 if _is_kept(name) and not spec.floating else spec for name, spec in formats.items()}


def fallbacks(config: DecoderConfig, settings: WeightSettings, formats: Mapping[str, Format]) -> str:
    """What `assign_formats` stored with one level of scales instead of two, in a line; empty when nothing."""
    wanted = {one for one in (settings.weights, settings.embedding, settings.head) if one in ONE_LEVEL}
    short = {
        name: shape[1] for name, shape in config.tensor_shapes().items()
        if len(shape) == 2 and shape[1] % _SUPERGROUP and formats[name].name in {ONE_LEVEL[one] for one in wanted}
    }  # fmt: skip
    if not short:
        return ""
    lengths = ", ".join(str(length) for length in sorted(set(short.values())))
    names = ", ".join(sorted({formats[name].name for name in short}))
    return f"{len(short)} matrices as {names}: rows of {lengths} are no multiple of {_SUPERGROUP}"


def _fitting(format_name: str, columns: int) -> str:
    return ONE_LEVEL[format_name] if format_name in ONE_LEVEL and columns % _SUPERGROUP else format_name


def _check_fit(name: str, format_name: str, columns: int) -> None:
    if _fitting(format_name, columns) != format_name:
        raise RecipeError(
            f"Tensor '{name}' has rows of {columns}, no multiple of the {_SUPERGROUP} that {format_name} needs. "
            f"Override it with {ONE_LEVEL[format_name]}."
        )


def _is_kept(name: str) -> bool:
    return is_router(name) or name == "position.weight"


def assign_runs(config: DecoderConfig, formats: Mapping[str, Format], activations: Activation) -> dict[str, LinearRun]:
    """Input precision of every matrix product; a matrix kept in floating point never gets int8 inputs."""
    return {
        name: LinearRun(activation=activation_of(formats[name], activations))
        for name in config.product_names()
        if name in formats
    }


def activation_of(spec: Format, wanted: Activation) -> Activation:
    """Input precision of a product with a matrix of this format, where quantized ones take `wanted`."""
    if not spec.floating:
        return wanted
    return "bf16" if spec.name == "bf16" and wanted != "f32" else "f32"


def named(name: str, error: RecipeError) -> RecipeError:
    """The same error with the tensor's name in front."""
    return RecipeError(f"Tensor '{name}': {error}")


def settings_help(settings: type[TechniqueSettings]) -> dict[str, str]:
    """Field -> its one-line help, for the command line and the reference."""
    fields: Mapping[str, Any] = settings.model_fields
    return {name: field.description or "" for name, field in fields.items()}
