"""The layouts panel16.v1, panel16.v2 and panel16.v3 against a scalar packer written from its definition."""

from __future__ import annotations

import time

import numpy as np
import pytest

from trilemma.core.errors import CheckpointError
from trilemma.formats import FORMATS, panel16
from trilemma.formats.grid import QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, pack, packed_bytes, unpack
from trilemma.formats.random_weights import random_matrix

INTEGER = [name for name in FORMATS.names() if not FORMATS.get(name).floating]
LATER = [name for name in INTEGER if FORMATS.get(name).layout != "panel16.v1"]
SHAPES = [(1, 1), (17, 33), (5, 172), (16, 576), (31, 64)]


def by_hand(matrix: QuantizedMatrix) -> tuple[bytes, list[float]]:
    """The codes blob and the flat scales, one value at a time."""
    rows, columns = matrix.shape
    padded = -(-columns // 32) * 32
    bits = matrix.spec.bits
    book = matrix.spec.values
    bias = 2 ** (bits - 1) if bits < 8 and matrix.spec.symmetric and not book else 0

    def code(row: int, k: int) -> int:
        if row >= rows or k >= columns:
            return bias
        return book.index(matrix.codes[row, k]) if book else bias + int(matrix.codes[row, k])

    def line(panel: int, byte) -> None:
        blob.extend(byte(panel * 16 + r, j) & 255 for r in range(16) for j in range(4))

    def nibbles(k: int):
        return lambda row, j: code(row, k + j) % 16 | code(row, k + 4 + j) % 16 << 4

    def further(k: int):
        count = 8 // (bits - 4)  # codes a byte
        return lambda row, j: sum((code(row, k + 4 * i + j) >> 4) << i * (bits - 4) for i in range(count))

    def fours(k: int):
        return lambda row, j: sum(code(row, k + 4 * i + j) << 2 * i for i in range(4))

    def threes(k: int, line: int):
        def byte(row: int, j: int) -> int:
            sixth, last = code(row, k + 24 + j), code(row, k + 28 + j)
            rest = (sixth % 4, last % 4, sixth // 4 + last // 4 * 2)[line]
            return code(row, k + 8 * line + j) + 8 * code(row, k + 8 * line + 4 + j) + 64 * rest

        return byte

    groups = padded // 16 if matrix.spec.group == 16 and not matrix.spec.supergroup else matrix.scales.shape[1]
    blob, scales = bytearray(), []
    for panel in range(-(-rows // 16)):
        for block in range(0, padded, 32):
            for k in range(block, block + 32, 16):
                if bits == 2:
                    line(panel, fours(k))
            for third in range(3):
                if bits == 3:
                    line(panel, threes(block, third))
            for k in range(block, block + 32, 4):
                if bits == 8:
                    line(panel, lambda row, j, k=k: code(row, k + j))
                elif k % 8 == 0 and bits >= 4:
                    line(panel, nibbles(k))
            for k in range(block, block + 32, {5: 32, 6: 16}.get(bits, 32)):
                if bits in (5, 6):
                    line(panel, further(k))
        for group in range(groups):
            for r in range(16):
                row = panel * 16 + r
                inside = row < rows and group < matrix.scales.shape[1]
                scales.append(float(matrix.scales[row, group]) if inside else 0.0)
    return bytes(blob), scales


def random_quantized(name: str, shape: tuple[int, int], rng: np.random.Generator) -> QuantizedMatrix:
    spec = FORMATS.get(name)
    codes = rng.choice(spec.legal_codes, shape)
    groups = (shape[0], spec.f16_groups(shape[1]))
    minima = None if spec.symmetric else rng.standard_normal(groups).astype(np.float16)
    scales = rng.standard_normal(groups).astype(np.float16)
    if spec.supergroup is None:
        return QuantizedMatrix(spec, codes, scales, minima)
    low, high = (0, 16) if spec.bits == 2 else (-128, 128)
    factors, low_factors = rng.integers(low, high, (2, shape[0], spec.groups(shape[1]))).astype(np.int8)
    return QuantizedMatrix(spec, codes, scales, minima, factors, None if spec.symmetric else low_factors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", INTEGER)
def test_bytes_are_those_of_the_definition(name, shape, random_generator):
    matrix = random_quantized(name, shape, random_generator)
    packed = pack(matrix)
    blob, scales = by_hand(matrix)
    assert packed.codes.tobytes() == blob
    np.testing.assert_array_equal(packed.scales, np.asarray(scales, np.float16))
    assert packed.codes.size % panel16.LINE_BYTES == 0


@pytest.mark.parametrize("shape", [*SHAPES, (18, 530)])
@pytest.mark.parametrize("name", LATER)
def test_later_versions_come_back_and_mean_code_times_both_scales(name, shape, random_generator):
    matrix = random_quantized(name, shape, random_generator)
    packed = pack(matrix)
    back = unpack(packed)
    assert packed.nbytes == packed_bytes(matrix.spec, shape)
    for part in ("codes", "scales", "minima", "sub_scales", "sub_minima"):
        np.testing.assert_array_equal(getattr(back, part), getattr(matrix, part))
    found = packed.dequantize()
    group, wide = matrix.spec.group, matrix.spec.supergroup or matrix.spec.group
    for row, k in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)]:
        scale = float(matrix.scales[row, k // wide])
        minimum = 0.0 if matrix.minima is None else float(matrix.minima[row, k // wide])
        if matrix.sub_scales is not None:
            scale *= int(matrix.sub_scales[row, k // group])
        if matrix.sub_minima is not None:
            minimum *= int(matrix.sub_minima[row, k // group])
        assert found[row, k] == np.float32(int(matrix.codes[row, k]) * scale + minimum)
    order = np.arange(shape[0])[::-1]
    np.testing.assert_array_equal(matrix.rows(order).dequantize(), matrix.dequantize()[order])


def test_factors_lie_by_panel_and_group_with_zeros_in_the_padding(random_generator):
    matrix = random_quantized("int6-g16-k", (17, 40), random_generator)
    factors = pack(matrix).sub_scales.reshape(2, 4, 16)  # 40 columns are padded to 64: four groups of 16
    for row in range(17):
        np.testing.assert_array_equal(factors[row // 16, :3, row % 16], matrix.sub_scales[row])
    assert not factors[:, 3].any()
    assert not factors[1, :, 1:].any()


@pytest.mark.parametrize("name", LATER)
def test_random_matrices_of_later_versions_have_the_usual_spread(name):
    values = random_matrix(FORMATS.get(name), (64, 512), 3).dequantize()
    assert abs(values.mean()) < 0.1 * 512**-0.5
    assert 0.8 < values.std() * 512**0.5 < 1.2


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
