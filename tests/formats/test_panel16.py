"""The layout panel16.v1 against a scalar packer written from its definition."""

from __future__ import annotations

import time

import numpy as np
import pytest

from trilemma.core.errors import CheckpointError
from trilemma.formats import FORMATS, panel16
from trilemma.formats.grid import QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, pack, unpack
from trilemma.formats.random_weights import random_matrix

INTEGER = [name for name in FORMATS.names() if name.startswith("int")]
SHAPES = [(1, 1), (17, 33), (5, 172), (16, 576), (31, 64)]


def by_hand(matrix: QuantizedMatrix) -> tuple[bytes, list[float]]:
    """The codes blob and the flat scales, one value at a time."""
    rows, columns = matrix.shape
    padded = -(-columns // 32) * 32
    step = 8 if matrix.spec.bits == 4 else 4
    bias = 8 if matrix.spec.bits == 4 and matrix.spec.symmetric else 0

    def code(row: int, k: int) -> int:
        return bias + (int(matrix.codes[row, k]) if row < rows and k < columns else 0)

    blob, scales = bytearray(), []
    for panel in range(-(-rows // 16)):
        for k in range(0, padded, step):
            for r in range(16):
                for j in range(4):
                    low = code(panel * 16 + r, k + j)
                    high = code(panel * 16 + r, k + 4 + j) << 4 if step == 8 else 0
                    blob.append((low | high) & 255)
        for group in range(matrix.scales.shape[1]):
            for r in range(16):
                row = panel * 16 + r
                scales.append(float(matrix.scales[row, group]) if row < rows else 0.0)
    return bytes(blob), scales


def random_quantized(name: str, shape: tuple[int, int], rng: np.random.Generator) -> QuantizedMatrix:
    spec = FORMATS.get(name)
    low, high = spec.code_range
    codes = rng.integers(low, high, shape, endpoint=True).astype(np.int8)
    groups = (shape[0], spec.groups(shape[1]))
    minima = None if spec.symmetric else rng.standard_normal(groups).astype(np.float16)
    return QuantizedMatrix(spec, codes, rng.standard_normal(groups).astype(np.float16), minima)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", INTEGER)
def test_bytes_are_those_of_the_definition(name, shape, random_generator):
    matrix = random_quantized(name, shape, random_generator)
    packed = pack(matrix)
    blob, scales = by_hand(matrix)
    assert packed.codes.tobytes() == blob
    np.testing.assert_array_equal(packed.scales, np.asarray(scales, np.float16))
    assert packed.codes.size % panel16.LINE_BYTES == 0


def test_blocks_of_many_panels_join_without_a_seam(random_generator, monkeypatch):
    matrix = random_quantized("int4-g32", (133, 70), random_generator)
    whole = pack(matrix)
    monkeypatch.setattr(panel16, "_BLOCK_CODES", 1)
    np.testing.assert_array_equal(pack(matrix).codes, whole.codes)
    np.testing.assert_array_equal(unpack(whole).codes, matrix.codes)


def test_wrong_sizes_and_unknown_layouts_are_refused(random_generator):
    packed = pack(random_quantized("int8-g32", (20, 40), random_generator))
    short = PackedMatrix(packed.spec, packed.shape, packed.codes[:-64], packed.scales)
    with pytest.raises(CheckpointError, match="expected"):
        unpack(short)
    strange = packed.spec.model_copy(update={"layout": "panel32.v9"})
    with pytest.raises(CheckpointError, match=r"panel32\.v9.*panel16\.v1"):
        unpack(PackedMatrix(strange, packed.shape, packed.codes, packed.scales))


@pytest.mark.parametrize("shape", [(33, 172), (16, 64)])
@pytest.mark.parametrize("name", FORMATS.names())
def test_random_matrices_are_well_formed_and_of_the_right_size(name, shape):
    spec = FORMATS.get(name)
    matrix = random_matrix(spec, shape, seed=1)
    values = matrix.dequantize()
    assert values.shape == shape
    assert 0.7 < values.std() * shape[1] ** 0.5 < 1.3
    if isinstance(matrix, PackedMatrix):
        again = pack(unpack(matrix))
        np.testing.assert_array_equal(again.codes, matrix.codes)
        np.testing.assert_array_equal(again.scales, matrix.scales)
    np.testing.assert_array_equal(random_matrix(spec, shape, seed=1).dequantize(), values)
    assert (random_matrix(spec, shape, seed=2).dequantize() != values).any()


def test_packing_is_fast_enough_for_large_vocabularies(random_generator):
    matrix = random_quantized("int4-g32", (8192, 2048), random_generator)
    start = time.perf_counter()
    pack(matrix)
    assert time.perf_counter() - start < 5  # about 0.1 s: 128256 rows are then a matter of seconds
