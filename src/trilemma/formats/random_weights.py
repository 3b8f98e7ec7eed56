"""Random weights made directly in their storage format, for measuring cost on a bare config.json.

Codes come as random bytes, so a model of billions of parameters is there in seconds and nothing
passes through f32. Scales are such that activations keep their size. The text that such a model
makes means nothing: quality is never measured on it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trilemma.formats import FORMATS, panel16
from trilemma.formats.grid import Format
from trilemma.formats.pack import PackedMatrix, check_layout
from trilemma.formats.plain import to_plain
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Activation, Float32, LinearRun, Model, StoredMatrix
from trilemma.model.plain import PlainMatrix

_FACTOR = 32  # of a group's scale, where scales have two levels
_FEW_FACTOR = 12  # the same of few bits, whose factors have four
_PERIOD = 1_000_003  # distinct random values of a floating-point matrix; a prime, so rows differ


def random_matrix(spec: Format, shape: tuple[int, int], seed: int) -> PackedMatrix | PlainMatrix:
    """A random matrix (out, in) in this format, of standard deviation about 1/sqrt(in)."""
    check_layout(spec.layout)
    rng = np.random.default_rng(np.random.SFC64(seed))
    deviation = shape[1] ** -0.5
    if spec.floating:
        return _random_plain(spec, shape, rng, deviation)
    low, high = spec.code_range
    scale = deviation / float(spec.legal_codes.std(dtype=np.float64))  # all codes are as likely
    factor = 1 if spec.supergroup is None else _factor(spec)
    groups = (shape[0], spec.f16_groups(shape[1]))
    scales = (scale / factor * rng.uniform(0.8, 1.2, groups)).astype(np.float16)
    if spec.layout == "panel16.v3" and spec.symmetric:  # few codes that are not centred: either sign, so that sums are
        scales *= np.where(rng.random(groups) < 0.5, np.float16(-1), np.float16(1))
    middle = np.float32(-(low + high) / 2)
    minima = None if spec.symmetric else (middle * scales.astype(np.float32)).astype(np.float16)
    codes = panel16.random_codes(spec, shape, rng)
    factors = None if spec.supergroup is None else _factors(spec, shape)
    minimum_factors = None if spec.symmetric or spec.pairs_factors else factors
    count = panel16.scale_groups(spec, shape[1])
    return PackedMatrix(
        spec, shape, codes, panel16.pack_scales(scales, count),
        None if minima is None else panel16.pack_scales(minima, count), factors, minimum_factors,
    )  # fmt: skip


def _factor(spec: Format) -> int:
    return _FACTOR if spec.bits > 3 else _FEW_FACTOR


def _factors(spec: Format, shape: tuple[int, int]) -> NDArray[np.int8]:
    """Equal factors of the scales of all groups, laid out, zero in padding."""
    one = _factor(spec)
    stored = np.array(one | one << 4 if spec.pairs_factors else one, dtype=np.uint8).view(np.int8)
    groups = np.full((shape[0], spec.groups(shape[1])), stored, dtype=np.int8)
    return panel16.pack_scales(groups, panel16.factor_groups(spec, shape[1]))


class RandomPackedSource:
    """A source of random tensors in the formats that `format_of(name)` names; the same seed, the same bytes."""

    random = True

    def __init__(self, config: DecoderConfig, format_of: Callable[[str], str], seed: int = 0) -> None:
        self._shapes = config.tensor_shapes()
        self._format_of = format_of
        self.seed = seed
        self.dtype = ",".join(self.stored_dtype(name) for name in self._shapes)  # part of the model's hash

    def stored_dtype(self, name: str) -> str:
        return self._format_of(name) if len(self._shapes[name]) == 2 else "f32"

    def read(self, name: str) -> Float32 | StoredMatrix:
        shape, seed = self._shapes[name], zlib.crc32(f"{self.seed}/{name}".encode())
        if len(shape) == 2:
            found = random_matrix(FORMATS.get(self.stored_dtype(name)), (shape[0], shape[1]), seed)
            return found.dequantize() if found.format == "f32" else found
        if name.endswith("norm.weight"):
            return np.ones(shape, dtype=np.float32)
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.02)


def with_random_weights(
    model: Model,
    format_of: Callable[[str], str],
    *,
    activation_of: Callable[[str], Activation] | None = None,
    seed: int = 0,
) -> Model:
    """The same config over random weights: `format_of` maps a matrix's name to its storage format.

    Args:
        activation_of: input precision of each matrix product; by default int8-g32 for integer
            formats, bf16 for bf16 and f16 weights, f32 for f32.
    """
    config = model.config
    choose = activation_of or (lambda name: default_activation(FORMATS.get(format_of(name))))
    linears = {name: LinearRun(activation=choose(name)) for name in config.product_names()}
    source = RandomPackedSource(config, format_of, seed)
    return Model(config, source, path=model.path, linears=linears, run=model.run)


def default_activation(spec: Format) -> Literal["f32", "bf16", "int8-g32"]:
    """The input precision that fits a weight format when nobody says otherwise."""
    if not spec.floating:
        return "int8-g32"
    return "f32" if spec.bits == 32 else "bf16"


def _random_plain(spec: Format, shape: tuple[int, int], rng: np.random.Generator, deviation: float) -> PlainMatrix:
    period = min(_PERIOD, shape[0] * shape[1])
    values = rng.standard_normal((1, period), dtype=np.float32) * np.float32(deviation)
    dtype: Literal["f32", "f16", "bf16"] = "f32" if spec.bits == 32 else ("bf16" if spec.name == "bf16" else "f16")
    bits = to_plain(values, dtype).bits
    repeated: NDArray[Any] = np.resize(bits, shape)
    return PlainMatrix(dtype, repeated)
