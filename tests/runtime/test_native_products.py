"""Matrix products of the native engine against numpy, at odd shapes, in every format, activation mode and set.

A decoder without layers is a product: logits = head . norm(embedding[token]). The packer here is written apart
from `trilemma.formats`, from the layout's definition alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from trilemma import _native
from trilemma.model.config import DecoderConfig

ISAS = _native.supported_isas()
SHAPES = [(511, 172), (16, 32), (3, 8), (40, 576), (33, 130), (100, 257)]  # rows, columns
TOKENS = [1, 2, 3, 5, 8, 16, 17, 31]
CODEBOOK = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


@dataclass
class Codes:
    """codes (rows, cols) int; scales and minima (rows, groups) f16; factors of both for each `sub_group` columns."""

    bits: int
    group: int
    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None
    sub_group: int = 0
    sub_scales: np.ndarray | None = None
    sub_minima: np.ndarray | None = None
    codebook: bool = False

    def dequantize(self) -> np.ndarray:
        codes = np.array(CODEBOOK)[self.codes] if self.codebook else self.codes
        wide = self.of_columns(self.scales, self.sub_scales) * codes
        return wide if self.minima is None else wide + self.of_columns(self.minima, self.sub_minima)

    def of_columns(self, values: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
        columns = self.codes.shape[1]
        wide = np.repeat(values.astype(np.float64), self.group or columns, axis=1)[:, :columns]
        return wide if factors is None else wide * np.repeat(factors, self.sub_group, axis=1)[:, :columns]


def random_codes(
    rng: np.random.Generator, rows: int, cols: int, bits: int, group: int, symmetric: bool, sub_group: int = 0,
    codebook: bool = False,
) -> Codes:  # fmt: skip
    groups = -(-cols // (group or cols))
    low = -(2 ** (bits - 1)) if symmetric and not codebook else 0
    codes = rng.integers(low, low + 2**bits, (rows, cols))
    scales = (rng.uniform(-1, 1, (rows, groups)) / 2**bits).astype(np.float16)  # negative scales are legal
    minima = None if symmetric else rng.uniform(-1, 0, (rows, groups)).astype(np.float16)
    if not sub_group:
        return Codes(bits, group, codes, scales, minima, codebook=codebook)
    sub_scales, sub_minima = rng.integers(*((0, 16) if bits == 2 else (-128, 128)), (2, rows, -(-cols // sub_group)))
    return Codes(bits, group, codes, scales, minima, sub_group, sub_scales, None if symmetric else sub_minima)


def pack_panels(c: Codes) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rows, cols = c.codes.shape
    panels, blocks = -(-rows // 16), -(-cols // 32)
    bias = 2 ** (c.bits - 1) if c.bits < 8 and c.minima is None and not c.codebook else 0
    full = np.full((panels * 16, blocks * 32), bias)
    full[:rows, :cols] = c.codes + bias
    out = bytearray()
    for panel in full.reshape(panels, 16, -1):
        step = 8 if c.bits < 8 else 4
        for block in range(0, blocks * 32, 32):
            if c.bits < 4:
                out += few_bits(panel[:, block : block + 32].reshape(16, 8, 4), c.bits)
                continue
            for k in range(block, block + 32, step):
                for r in range(16):
                    for j in range(4):
                        high = (int(panel[r, k + 4 + j]) & 15) << 4 if c.bits < 8 else 0
                        out.append((int(panel[r, k + j]) & 15 | high) if c.bits < 8 else int(panel[r, k + j]) & 255)
            out += further_bits(panel[:, block : block + 32], c.bits)
    count = 2 * blocks if c.group == 16 else None
    minima = None if c.minima is None else by_panel(c.minima, count)
    return np.frombuffer(bytes(out), np.uint8), by_panel(c.scales, count), minima


def few_bits(quads: np.ndarray, bits: int) -> bytes:
    """Lines of 16 rows of eight quads of columns, (16, 8, 4), in 2 or 3 bits."""
    if bits == 2:
        lines = [sum(quads[:, 4 * line + i] << 2 * i for i in range(4)) for line in range(2)]
    else:
        sixth, last = quads[:, 6], quads[:, 7]
        rest = (sixth & 3, last & 3, sixth >> 2 | last >> 2 << 1)
        lines = [quads[:, 2 * i] | quads[:, 2 * i + 1] << 3 | rest[i] << 6 for i in range(3)]
    return np.array(lines).astype(np.uint8).tobytes()


def further_bits(block: np.ndarray, bits: int) -> bytes:
    """What codes of 5 and 6 bits have above four, of 16 rows and 32 columns."""
    if bits not in (5, 6):
        return b""
    count = 8 // (bits - 4)  # codes a byte
    high = (block >> 4).reshape(16, -1, count, 4)  # row, line, code in its byte, byte of the row
    return (high << (np.arange(count) * (bits - 4))[:, None]).sum(axis=2).transpose(1, 0, 2).astype(np.uint8).tobytes()


def by_panel(values: np.ndarray, count: int | None = None) -> np.ndarray:
    """(rows, groups) as [panel][count][16], zero in padding."""
    rows, groups = values.shape
    panels = -(-rows // 16)
    padded = np.zeros((panels * 16, count or groups), values.dtype)
    padded[:rows, :groups] = values
    return np.ascontiguousarray(padded.reshape(panels, 16, -1).transpose(0, 2, 1)).reshape(-1).view(np.uint8)


def factors(c: Codes) -> dict:
    """What `add_packed` takes besides where scales have two levels."""
    if not c.sub_group:
        return {}
    count = -(-c.codes.shape[1] // 32) * 32 // c.sub_group
    parts = {"sub_scales": c.sub_scales, "sub_minima": c.sub_minima}
    if c.bits == 2:  # in one byte
        parts = {"sub_scales": (c.sub_scales | c.sub_minima << 4).astype(np.uint8).view(np.int8)}
    given = {name: by_panel(part.astype(np.int8), count) for name, part in parts.items() if part is not None}
    return {"sub_group": c.sub_group, **given}


def config_of(rows: int, cols: int, *, tied: bool) -> dict:
    """A decoder without layers."""
    config = DecoderConfig(
        family="llama", dim=cols, vocab_size=rows, max_context=64, layers=(), norm_eps=1e-5, tied=tied
    )
    return config.model_dump()


def layerless(rows: int, cols: int, embedding: np.ndarray, add_head) -> _native.Model:
    """vocab must cover embedding rows and head rows alike: the larger is padded with zeros."""
    model = _native.Model(config_of(rows, cols, tied=False))
    table = np.zeros((rows, cols), np.float32)
    table[: len(embedding)] = embedding[:rows]
    model.add_plain("embedding.weight", "f32", rows, cols, table.reshape(-1).view(np.uint8))
    model.add_vector("final_norm.weight", np.ones(cols, np.float32))
    add_head(model)
    model.finalize()
    return model


def run(model: _native.Model, tokens: int, isa: str, *, distinct: int, threads: int = 1, chunk: int = 0) -> np.ndarray:
    context = _native.Context(model, threads=threads, isa=isa, kv_cache="f32", max_context=64, chunk=chunk)
    ids = np.arange(tokens, dtype=np.int32) % distinct
    return context.forward([(context.create(), ids, "all")])


def normed_inputs(embedding: np.ndarray, cols: int) -> np.ndarray:
    """What the product sees, bit for bit: an identity matrix as the head."""
    eye = np.eye(cols, dtype=np.float32)
    model = layerless(
        cols, cols, embedding, lambda m: m.add_plain("head.weight", "f32", cols, cols, eye.reshape(-1).view(np.uint8))
    )
    distinct = min(len(embedding), cols)
    return run(model, distinct, "scalar", distinct=distinct)


def int8_inputs(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (tokens, cols) and scale of each column's group of 32; for weights of few bits 2^-e of the row's scale."""
    pad = -x.shape[1] % 32
    groups = np.pad(x, ((0, 0), (0, pad))).reshape(len(x), -1, 32)
    peak = np.abs(groups).max(-1, keepdims=True)
    if bits <= 5:
        row = peak.max(1, keepdims=True)
        peak = row * np.float32(2) ** -np.floor(np.log2(row.astype(np.float64) / peak)).astype(np.float32)
    scale = peak / np.float32(127)
    codes = np.rint(groups * (np.float32(1) / scale))
    wide = np.broadcast_to(scale, groups.shape)
    return codes.reshape(len(x), -1)[:, : x.shape[1]], wide.reshape(len(x), -1)[:, : x.shape[1]]


def bf16(x: np.ndarray) -> np.ndarray:
    raw = x.astype(np.float32).view(np.uint32)
    return (((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16) << 16).view(np.float32)


def bf16_weights(weights: np.ndarray) -> np.ndarray:
    """As the matrix unit takes them, scales included: ties away from zero."""
    raw = weights.astype(np.float32).view(np.uint32)
    return ((raw + 0x8000) & 0xFFFF0000).view(np.float32).astype(np.float64)


def expected(weights: np.ndarray, x: np.ndarray, activation: str, bits: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """The product in f64 and the size of its terms, which the error is measured against."""
    seen = x.astype(np.float64)
    if activation == "bf16":
        seen = bf16(x).astype(np.float64)
    if activation == "int8-g32":
        codes, scale = int8_inputs(x, bits)
        seen = codes.astype(np.float64) * scale.astype(np.float64)
    return seen @ weights.T, np.abs(seen) @ np.abs(weights).T


def embedding_for(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return rng.standard_normal((min(31, rows, cols), cols)).astype(np.float32) * np.float32(2)


def check_everywhere(
    model: _native.Model, weights: np.ndarray, x: np.ndarray, activation: str, *, bits: int = 16,
    minima: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Near the product, and equal in bits over instruction sets, threads and chunks.

    The processor's own bf16 products round in their own way: each such set is equal to itself, and a matrix unit takes
    quantized weights (`bits` below 16) rounded to bf16. `minima` (rows, cols): codes and they are summed apart.
    """
    wanted, size = expected(weights, x, activation, bits)
    if minima is not None:
        size += expected(np.abs(minima), x, activation, bits)[1]
    apart = [isa for isa in ISAS if isa in ("avx512bf16", "amx") and activation == "bf16"]
    check_equal_and_near(model, wanted, size, [isa for isa in ISAS if isa not in apart])
    for isa in apart:
        rounds = isa == "amx" and bits < 16
        near = expected(bf16_weights(weights), x, activation, bits)[0] if rounds else wanted
        check_equal_and_near(model, near, size, [isa])


def check_equal_and_near(model: _native.Model, wanted: np.ndarray, size: np.ndarray, isas: list[str]) -> None:
    distinct = len(wanted)
    first = run(model, 1, isas[-1], distinct=distinct)
    for tokens in TOKENS:
        results = [run(model, tokens, isa, distinct=distinct, threads=threads) for isa in isas for threads in (1, 2)]
        results.append(run(model, tokens, isas[-1], distinct=distinct, chunk=7))
        for other in results[1:]:
            np.testing.assert_array_equal(other, results[0])
        np.testing.assert_array_equal(results[0][:1], first)
        picked = np.arange(tokens) % distinct
        error = np.abs(results[0].astype(np.float64) - wanted[picked])
        assert (error <= 1e-6 * size[picked] + 1e-30).all(), float((error / size[picked]).max())


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("activation", ["int8-g32", "bf16", "f32"])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(8, 0, True), (8, 32, True), (8, 128, True), (4, 32, True), (4, 128, True), (4, 0, True), (4, 64, False)],
)
def test_quantized(random_generator, rows, cols, activation, bits, group, symmetric):
    c = random_codes(random_generator, rows, cols, bits, group, symmetric)
    embedding = embedding_for(random_generator, rows, cols)
    codes, scales, minima = pack_panels(c)
    model = layerless(
        rows, cols, embedding,
        lambda m: m.add_packed("head.weight", bits, symmetric, group, rows, cols, activation, codes, scales, minima),
    )  # fmt: skip
    check_everywhere(model, c.dequantize(), normed_inputs(embedding, cols), activation, bits=bits)


@pytest.mark.parametrize(("rows", "cols"), [*SHAPES[:3], (40, 576)])
@pytest.mark.parametrize("activation", ["int8-g32", "bf16", "f32"])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "sub_group"),
    [(5, 32, True, 0), (5, 32, False, 0), (4, 256, False, 32), (5, 256, False, 32), (6, 256, True, 16)],
)
def test_five_and_six_bits_and_scales_of_two_levels(
    random_generator, rows, cols, activation, bits, group, symmetric, sub_group
):
    c = random_codes(random_generator, rows, cols, bits, group, symmetric, sub_group)
    check_product(random_generator, c, activation)


@pytest.mark.parametrize(("rows", "cols"), [*SHAPES[:3], (40, 576)])
@pytest.mark.parametrize("activation", ["int8-g32", "bf16", "f32"])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "sub_group"),
    [(2, 32, False, 0), (2, 16, False, 0), (2, 256, False, 16), (3, 32, True, 0), (3, 128, False, 0), (3, 16, True, 0),
     (3, 256, True, 16), (6, 64, True, 0), (6, 16, True, 0)],
)  # fmt: skip
def test_two_and_three_bits_and_groups_of_16(
    random_generator, rows, cols, activation, bits, group, symmetric, sub_group
):
    c = random_codes(random_generator, rows, cols, bits, group, symmetric, sub_group)
    check_product(random_generator, c, activation)


@pytest.mark.parametrize(("rows", "cols"), [*SHAPES[:3], (40, 576)])
@pytest.mark.parametrize("activation", ["int8-g32", "bf16", "f32"])
def test_a_codebook(random_generator, rows, cols, activation):
    c = random_codes(random_generator, rows, cols, 4, 32, True, codebook=True)
    check_product(random_generator, c, activation)


def check_product(rng: np.random.Generator, c: Codes, activation: str) -> None:
    bits, symmetric, group, (rows, cols) = c.bits, c.minima is None, c.group, c.codes.shape
    embedding = embedding_for(rng, rows, cols)
    codes, scales, minima = pack_panels(c)

    def add_head(m: _native.Model) -> None:
        m.add_packed(
            "head.weight", bits, symmetric, group, rows, cols, activation, codes, scales, minima, **factors(c),
            codebook=c.codebook,
        )  # fmt: skip

    model = layerless(rows, cols, embedding, add_head)
    minima = None if c.minima is None else c.of_columns(c.minima, c.sub_minima)
    check_everywhere(model, c.dequantize(), normed_inputs(embedding, cols), activation, bits=bits, minima=minima)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("activation", ["f32", "bf16"])
def test_plain(random_generator, rows, cols, dtype, activation):
    weights = random_generator.standard_normal((rows, cols)).astype(np.float32)
    if dtype == "f32":
        bits, values = weights, weights
    elif dtype == "f16":
        bits = (weights * np.float32(1e-3)).astype(np.float16)  # some of them subnormal
        values = bits.astype(np.float32)
    else:
        values = bf16(weights)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    embedding = embedding_for(random_generator, rows, cols)
    raw = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
    model = layerless(rows, cols, embedding, lambda m: m.add_plain("head.weight", dtype, rows, cols, raw, activation))
    check_everywhere(model, values.astype(np.float64), normed_inputs(embedding, cols), activation)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "sub_group", "codebook"),
    [(8, 0, True, 0, False), (4, 32, True, 0, False), (4, 64, False, 0, False), (5, 32, True, 0, False),
     (5, 32, False, 0, False), (4, 256, False, 32, False), (5, 256, False, 32, False), (6, 256, True, 16, False),
     (6, 32, True, 0, False), (3, 64, True, 0, False), (3, 32, False, 0, False), (3, 16, True, 0, False),
     (3, 256, True, 16, False), (2, 64, False, 0, False), (2, 16, False, 0, False), (2, 256, False, 16, False),
     (4, 32, True, 0, True)],
)  # fmt: skip
def test_rows_of_a_tied_embedding(random_generator, bits, group, symmetric, sub_group, codebook):
    """The gather gives code * scale (+ minimum), each rounded once; the same matrix is the head."""
    rows, cols = 37, 296
    c = random_codes(random_generator, rows, cols, bits, group, symmetric, sub_group, codebook)
    codes, scales, minima = pack_panels(c)
    model = _native.Model(config_of(rows, cols, tied=True))
    model.add_packed(
        "embedding.weight", bits, symmetric, group, rows, cols, "f32", codes, scales, minima, **factors(c),
        codebook=codebook,
    )  # fmt: skip
    model.add_vector("final_norm.weight", np.ones(cols, np.float32))
    model.finalize()
    weights = c.dequantize()
    found = run(model, 3, ISAS[-1], distinct=3)
    x = weights[:3] / np.sqrt((weights[:3] ** 2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, x @ weights.T, rtol=1e-4, atol=1e-4 * np.abs(x @ weights.T).max())


def test_a_nan_is_not_swallowed_by_int8_activations():
    c = random_codes(np.random.default_rng(1), 16, 64, 8, 32, True)
    codes, scales, _ = pack_panels(c)
    embedding = np.full((3, 64), np.nan, np.float32)
    model = layerless(
        16, 64, embedding, lambda m: m.add_packed("head.weight", 8, True, 32, 16, 64, "int8-g32", codes, scales)
    )
    for isa in ISAS:
        assert np.isnan(run(model, 1, isa, distinct=1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, True, 48, 16, 64, "int8-g32", 512, 64), "multiple of 32"),
        ((4, True, 32, 16, 64, "int8-g32", 511, 64), "codes hold 511 bytes, expected 512"),
        ((4, True, 32, 16, 64, "int8-g32", 512, 62), "scales hold 62 bytes, expected 64"),
        ((8, False, 32, 16, 64, "int8-g32", 1024, 64), "8-bit asymmetric"),
        ((2, True, 32, 16, 64, "int8-g32", 256, 64), "2-bit symmetric"),
        ((4, True, 16, 16, 64, "int8-g32", 512, 128), "4-bit symmetric codes in groups of 16"),
        ((3, True, 16, 16, 40, "int8-g32", 384, 96), "scales hold 96 bytes, expected 128"),
        ((4, True, 32, 16, 64, "int8", 512, 64), "Unknown activation 'int8'"),
        ((4, True, 32, 17, 64, "int8-g32", 1024, 128), "the config says \\(16, 64\\)"),
    ],
)
def test_wrong_buffers_are_refused(arguments, message):
    bits, symmetric, group, rows, cols, activation, codes, scales = arguments
    model = _native.Model(config_of(16, 64, tied=True))
    with pytest.raises(_native.NativeError, match=message):
        model.add_packed(
            "embedding.weight", bits, symmetric, group, rows, cols, activation,
            np.zeros(codes, np.uint8), np.zeros(scales, np.uint8),
        )  # fmt: skip
