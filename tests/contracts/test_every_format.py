"""What every registered format promises: packing is lossless, bytes are what it says, errors stay within the grid."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.formats import FORMATS
from trilemma.formats.grid import QuantizedMatrix
from trilemma.formats.pack import pack, packed_bytes, unpack
from trilemma.formats.plain import to_plain
from trilemma.formats.quantize import quantize_rtn

SHAPES = [(1, 1), (16, 32), (17, 33), (64, 172), (5, 576), (48, 129)]
# Largest error as a share of the group's largest magnitude: half a step of the grid, and a little for f16 scales.
WITHIN = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8}


def _within(name: str) -> float:
    spec = FORMATS.get(name)
    if spec.floating:
        return WITHIN[name]
    low, high = spec.code_range
    if spec.values is not None:  # the widest gap, or what lies beyond the other end
        return 1.02 * max(max(np.diff(spec.values)) / 2, -low - high) / -low
    steps = high if spec.symmetric else high - low
    return 1.02 * (0.5 if spec.bits == 8 else 1.0) / steps * (1 if spec.symmetric else 2)


@pytest.mark.parametrize("name", FORMATS.names())
def test_the_table_names_the_format(name):
    spec = FORMATS.get(name)
    assert spec.name == name
    assert f"int{spec.bits}" in name or spec.floating or (spec.values is not None and f"nl{spec.bits}" in name)
    assert spec.group is None or f"g{spec.group}" in name
    assert name.endswith("-k") == (spec.supergroup is not None)
    assert spec.supergroup is None or spec.supergroup % (spec.group or 0) == 0
    assert spec.supergroup is not None or spec.symmetric != name.endswith("-asym")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS.names())
def test_packing_is_lossless_and_bytes_are_as_stated(name, shape, random_generator):
    spec = FORMATS.get(name)
    values = random_generator.standard_normal(shape).astype(np.float32)
    if spec.floating:
        stored = to_plain(values, name)
        assert stored.nbytes == packed_bytes(spec, shape) == stored.bits.nbytes
        assert stored.format == name
        return
    codes = random_generator.choice(spec.legal_codes, shape)
    groups, fine = (shape[0], spec.f16_groups(shape[1])), (shape[0], spec.groups(shape[1]))
    scales = random_generator.standard_normal(groups).astype(np.float16)  # negative scales are legal
    minima = None if spec.symmetric else random_generator.standard_normal(groups).astype(np.float16)
    factors: list[np.ndarray | None] = [None, None]
    if spec.supergroup is not None:
        ends = (0, 16) if spec.pairs_factors else (-128, 128)
        factors[0] = random_generator.integers(*ends, fine).astype(np.int8)
        factors[1] = None if spec.symmetric else random_generator.integers(*ends, fine).astype(np.int8)
    matrix = QuantizedMatrix(spec, codes, scales, minima, *factors)
    packed = pack(matrix)
    again = unpack(packed)
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_array_equal(again.scales, scales)
    for found, wanted in zip((again.minima, again.sub_scales, again.sub_minima), (minima, *factors), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert packed.format == matrix.format == name
    assert packed.shape == shape
    assert packed.nbytes == packed_bytes(spec, shape) == matrix.nbytes
    np.testing.assert_array_equal(packed.dequantize(), matrix.dequantize())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS.names())
def test_rounding_stays_within_the_grid(name, shape, random_generator):
    spec = FORMATS.get(name)
    values = (random_generator.standard_normal(shape) * 10 ** random_generator.uniform(-3, 2)).astype(np.float32)
    stored = to_plain(values, name) if spec.floating else quantize_rtn(values, spec)
    error = np.abs(stored.dequantize() - values)
    size = 1 if spec.floating else spec.group_size(shape[1])
    # Scales are f16: very small groups meet its smallest steps of 2**-24, which every code multiplies.
    floor = 1e-7 if spec.floating else 2**spec.bits * 2.0**-25
    for first in range(0, shape[1], size):
        part = slice(first, first + size)
        scale = np.abs(values[:, part]).max(axis=1, keepdims=True)
        # With two levels a group's step is a multiple of its supergroup's: at most one more than it needs.
        wide = slice(first - first % (spec.supergroup or 1), first - first % (spec.supergroup or 1) + 256)
        largest = np.abs(values[:, wide]).max(axis=1, keepdims=True)
        coarse = 0 if spec.supergroup is None else _within(name) * largest / spec.factor_range[1]
        assert (error[:, part] <= _within(name) * scale + coarse + floor * 64).all()


@pytest.mark.parametrize("name", FORMATS.names())
def test_more_bits_and_smaller_groups_never_take_fewer_bytes(name):
    spec = FORMATS.get(name)
    bits = packed_bytes(spec, (512, 512)) * 8 / 512**2
    two_levels = 0 if spec.supergroup is None else 32 / spec.supergroup
    assert spec.bits <= bits <= spec.bits + (0 if spec.floating else 32 / (spec.group or 512) + two_levels) + 1e-9


def test_zero_and_constant_matrices_come_back():
    for name in FORMATS.names():
        spec = FORMATS.get(name)
        for value in (0.0, 1.0, -2.0):
            values = np.full((3, 40), value, np.float32)
            stored = to_plain(values, name) if spec.floating else quantize_rtn(values, spec)
            np.testing.assert_allclose(stored.dequantize(), values, rtol=2e-3, err_msg=name)
