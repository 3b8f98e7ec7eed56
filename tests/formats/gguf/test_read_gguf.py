"""GGUF in: what was written comes back bit for bit, values agree with the gguf package, damage ends in one error."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.formats.artifact import load_any, read_artifact, write_artifact
from trilemma.formats.gguf.blocks import encode_matrix, target_of
from trilemma.formats.gguf.decode import DECODERS, FORMAT_OF, decode_matrix, take_rows
from trilemma.formats.gguf.read import read_gguf
from trilemma.formats.gguf.write import write_gguf
from trilemma.formats.grid import QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, pack, unpack
from trilemma.formats.random_weights import with_random_weights
from trilemma.model.gguf import gguf_name, read_gguf_header
from trilemma.model.gguf.structure import ROPE_FACTORS
from trilemma.model.model import LinearRun, Model
from trilemma.model.rope import make_rope
from trilemma.model.sources import MemorySource
from trilemma.runtime import EngineOptions, open_engine

WIDE = {"dim": 64, "head_dim": 16, "heads": 4, "kv_heads": 2, "ffn": 160, "vocab": 97}
PLACES = {"Q6_K": [208], "Q5_1": [0, 2], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q2_K": [80, 82],
          "Q3_K": [108]}  # fmt: skip  # of f16 values in a block
ONLY_ELSEWHERE = gguf.GGMLQuantizationType.IQ4_XS  # a type that no format here holds
FORMATS_BACK = ["f32", "f16", "bf16", "int8-g32", "int4-g32", "int4-g32-asym", "int5-g32", "int5-g32-asym",
                "nl4-g32"]  # fmt: skip


def activation_of(name: str) -> str:
    return "f32" if name in ("f32", "f16", "bf16") else "int8-g32"


def with_rope(model, rope):
    layers = tuple(
        layer.model_copy(update={"attention": layer.attention.model_copy(update={"rope": rope})})
        for layer in model.config.layers
    )
    return model.with_config(model.config.model_copy(update={"layers": layers}))


def built(tiny_model, format_name, **sizes):
    model = with_rope(tiny_model(**{**WIDE, **sizes}), make_rope("default", 1e4, {}, head_dim=16))
    run = activation_of(format_name)
    return with_random_weights(model, lambda _: format_name, activation_of=lambda _: run, seed=4)


def parts(stored) -> list[np.ndarray]:
    if isinstance(stored, PackedMatrix):
        stored = unpack(stored)
    if isinstance(stored, QuantizedMatrix):
        return [part for part in (stored.codes, stored.scales, stored.minima) if part is not None]
    return [stored if isinstance(stored, np.ndarray) else stored.bits]


@pytest.mark.parametrize("format_name", FORMATS_BACK)
@pytest.mark.parametrize(
    "sizes", [{}, {"qkv_bias": True, "tied": False}, {"qk_norm": True}], ids=["llama", "qwen2", "qwen3"]
)
def test_codes_scales_and_logits_come_back_bit_for_bit(tiny_model, tmp_path, format_name, sizes):
    model = built(tiny_model, format_name, **sizes)
    write_gguf(model, tmp_path / "model.gguf")
    back = load_any(tmp_path / "model.gguf")
    assert back.config == model.config
    for name in model.names():
        for ours, theirs in zip(parts(model.stored(name)), parts(back.stored(name)), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.tobytes() == theirs.tobytes(), name
    tokens = np.arange(40) % 97
    logits = []
    for one in (model, back):
        engine = open_engine(one, options=EngineOptions(threads=1))
        logits.append(engine.logits(tokens))
        engine.close()
    np.testing.assert_array_equal(logits[0], logits[1])


def random_blocks(kind: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, bytes) random blocks of a GGML type whose f16 scales are finite."""
    number = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[number]
    blocks = rng.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for at in PLACES.get(kind, [0]):
        scales = rng.standard_normal((rows, columns // values, 1)).astype(np.float16)
        blocks[:, :, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", sorted(set(DECODERS) - {"F32", "F16", "BF16"}))
def test_any_block_has_the_values_of_the_gguf_package(kind, random_generator):
    raw = random_blocks(kind, 19, 512, random_generator)
    found = decode_matrix(raw.reshape(-1), kind, (19, 512), "w")
    wanted = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(found.dequantize(), wanted)
    np.testing.assert_array_equal(pack(found).dequantize(), wanted)
    assert encode_matrix(found, target_of(found.spec, 512), None).tobytes() == raw.tobytes()
    order = random_generator.permutation(19)
    np.testing.assert_array_equal(take_rows(found, order).dequantize(), wanted[order])


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_a_file_of_these_blocks_runs_as_its_values_do_and_survives_an_artifact(tiny_model, tmp_path, kind):
    from trilemma.core.recipe import Recipe

    sizes = {"dim": 256, "head_dim": 64, "heads": 4, "kv_heads": 2, "ffn": 512, "vocab": 97}
    path = _writer(tmp_path / "model.gguf", tiny_model(**sizes), gguf.GGMLQuantizationType[kind])
    model = load_any(path)
    assert model.format_of("layers.0.ffn.up.weight") == FORMAT_OF[kind]
    values = Model(model.config, MemorySource({name: model.tensor(name) for name in model.names()}))
    as_values = dict.fromkeys(model.config.product_names(), LinearRun(activation="f32"))
    exact = Model(model.config, model.source, linears=as_values)
    tokens = np.arange(40) % 97
    logits = {}
    for name, one in {"blocks": exact, "values": values, "int8": model}.items():
        # a bf16 cache would round what differs in the last bit to neighbours
        engine = open_engine(one, options=EngineOptions(threads=1, kv_cache="f32"))
        logits[name] = engine.logits(tokens)
        engine.close()
    size = np.abs(logits["values"]).max()
    np.testing.assert_allclose(logits["blocks"], logits["values"], atol=1e-4 * size)
    assert np.abs(logits["int8"] - logits["values"]).max() < 0.1 * size
    write_artifact(model, tmp_path / "artifact", Recipe(name="copy"))
    again = read_artifact(tmp_path / "artifact")
    engine = open_engine(again, options=EngineOptions(threads=1, kv_cache="f32"))
    np.testing.assert_array_equal(engine.logits(tokens), logits["int8"])
    engine.close()


@pytest.mark.parametrize("kind", [kind for kind in sorted(DECODERS) if not kind.endswith(("_K", "_NL"))])
def test_values_are_those_of_the_gguf_package(kind, random_generator):
    shape, number = (5, 96), gguf.GGMLQuantizationType[kind]
    values = random_generator.standard_normal(shape).astype(np.float32)
    raw = np.ascontiguousarray(gguf.quantize(values, number)).reshape(-1).view(np.uint8)
    found = decode_matrix(raw, kind, shape, "w")
    wanted = gguf.dequantize(gguf.quantize(values, number), number)
    np.testing.assert_array_equal(found if isinstance(found, np.ndarray) else found.dequantize(), wanted)


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16.0}


@pytest.mark.parametrize(("kind", "parameters"), [("llama3", LLAMA3), ("linear", {"factor": 2.0}), ("yarn", YARN)])
def test_rope_scalings_come_back(tiny_model, tmp_path, kind, parameters):
    model = with_rope(tiny_model(**WIDE), make_rope(kind, 5e5, parameters, head_dim=16))
    write_gguf(model, tmp_path / "model.gguf")
    assert load_any(tmp_path / "model.gguf").config == model.config


def test_a_table_of_factors_that_is_nobodys_setting_is_kept_as_a_table(tiny_model, tmp_path):
    rope = make_rope("llama3", 1e4, {**LLAMA3, "low_freq_factor": 1.5}, head_dim=16)
    write_gguf(with_rope(tiny_model(**WIDE), rope), tmp_path / "model.gguf")
    found = load_any(tmp_path / "model.gguf").config.layers[0].attention.rope
    assert (found.kind, found.parameters) == ("llama3", {})
    np.testing.assert_allclose(found.inverse_frequencies, rope.inverse_frequencies, rtol=1e-6)


def test_an_artifact_made_from_a_gguf_file_has_its_tokenizer(hearth_path, tmp_path):
    from trilemma.core.recipe import Recipe
    from trilemma.model.tokenizer import Tokenizer

    write_gguf(load_any(hearth_path), tmp_path / "model.gguf")
    opened = load_any(tmp_path / "model.gguf")
    assert opened.path == tmp_path / "model.gguf"
    write_artifact(opened, tmp_path / "artifact", Recipe(name="copy"))
    again = read_artifact(tmp_path / "artifact")
    text = "One day, said the fox, I'll come back."
    wanted = Tokenizer.load(hearth_path).encode(text)
    assert Tokenizer.load(again.path).encode(text) == Tokenizer.load(opened.path).encode(text) == wanted
    assert again.stored("embedding.weight").bits.tobytes() == opened.stored("embedding.weight").bits.tobytes()


def test_types_without_a_decoder_are_refused_by_name(tiny_model, tmp_path):
    sizes = {**WIDE, "dim": 256, "head_dim": 64, "ffn": 256}
    writer = _writer(tmp_path / "model.gguf", tiny_model(**sizes), ONLY_ELSEWHERE)
    model = load_any(writer)
    with pytest.raises(UnsupportedModelError, match=r"IQ4_XS.*--runtime llama\.cpp.*llama-quantize"):
        model.format_of("layers.0.ffn.up.weight")
    with pytest.raises(UnsupportedModelError, match="IQ4_XS"):
        open_engine(model)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [("llama.attention.scale", 0.5, "attention.scale"), ("llama.rope.dimension_count", 8, "rotate"),
     ("llama.logit_scale", 2.0, "logit_scale")],
)  # fmt: skip
def test_what_would_mean_something_else_is_refused(tiny_model, tmp_path, key, value, why):
    path = _writer(tmp_path / "model.gguf", tiny_model(**WIDE), gguf.GGMLQuantizationType.Q8_0, {key: value})
    with pytest.raises(UnsupportedModelError, match=why):
        load_any(path)


def test_an_unknown_tensor_is_refused(tiny_model, tmp_path):
    path = _writer(tmp_path / "model.gguf", tiny_model(**WIDE), gguf.GGMLQuantizationType.Q8_0, extra="blk.0.sinks")
    with pytest.raises(UnsupportedModelError, match="sinks"):
        load_any(path)


def test_a_cut_file_is_refused_before_a_tensor_is_read(tiny_model, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model(**WIDE), path)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 4000, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged or cut"):
            load_any(path)


def test_any_flipped_header_byte_ends_in_a_model_or_one_clear_error(tiny_model, tmp_path, random_generator):
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model(**WIDE), path)
    whole = path.read_bytes()
    start = min(tensor.offset for tensor in read_gguf_header(path).tensors.values())
    for _ in range(150):
        damaged = bytearray(whole)
        for at in random_generator.integers(0, start, 2):
            damaged[at] = random_generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            model = load_any(path)
            for name in model.names():
                model.tensor(name)
        except (CheckpointError, UnsupportedModelError):
            pass


def test_an_offset_beyond_any_file_is_refused(tiny_model, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model(**WIDE), path)
    whole = path.read_bytes()
    name = b"output_norm.weight"
    at = whole.index(name) + len(name) + 4 + 8 + 4  # behind dimensions (one), its size and the type
    path.write_bytes(whole[:at] + struct.pack("<Q", (1 << 64) - 64) + whole[at + 8 :])
    with pytest.raises(CheckpointError, match="output_norm"):
        load_any(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0", "Q5_1"])
def test_values_that_are_not_finite_are_refused(kind):
    raw = gguf.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType[kind])
    damaged = np.ascontiguousarray(raw).reshape(-1).view(np.uint8).copy()
    damaged[:4] = 0xFF
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        decode_matrix(damaged, kind, (2, 64), "w")


@pytest.mark.parametrize(
    ("kind", "at"), [("Q2_K", 80), ("Q3_K", 108), ("Q4_K", 0), ("Q4_K", 2), ("Q5_K", 2), ("Q6_K", 208)]
)
def test_scales_of_supergroups_that_are_not_finite_are_refused(kind, at, random_generator):
    damaged = random_blocks(kind, 2, 256, random_generator)
    damaged[1, at : at + 2] = 0xFF
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        decode_matrix(damaged.reshape(-1), kind, (2, 256), "w")


def test_shards_are_one_model(tiny_model, tmp_path):
    model = built(tiny_model, "int8-g32")
    write_gguf(model, tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    writers = [gguf.GGUFWriter(tmp_path / f"m-0000{n}-of-00002.gguf", "llama") for n in (1, 2)]
    for key, field in reader.fields.items():
        if key.startswith("llama.") and not key.endswith("architecture"):
            for writer in writers:
                writer.add_key_value(key, field.contents(), field.types[0])
    for index, tensor in enumerate(reader.tensors):
        writers[index % 2].add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for writer in writers:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    found = read_gguf(tmp_path / "m-00001-of-00002.gguf")
    for name in model.names():
        np.testing.assert_array_equal(found.tensor(name), model.tensor(name))
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="m-00002"):
        read_gguf(tmp_path / "m-00001-of-00002.gguf")


def _blocks_of(values, kind):
    """The values in blocks of a type; random ones of a small spread where the package can not quantize."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        rng = np.random.default_rng(values.size)
        if kind.name not in DECODERS:
            return np.zeros((len(values), values.shape[1] // 256 * 136), np.uint8)
        raw = random_blocks(kind.name, len(values), values.shape[1], rng)
        deviation = gguf.dequantize(raw, kind).std()
        size = gguf.GGML_QUANT_SIZES[kind][1]
        blocks = raw.reshape(-1, size)
        for at in PLACES.get(kind.name, [0]):
            scales = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)
            blocks[:, at : at + 2] = (scales * np.float16(0.05 / deviation)).view(np.uint8)
        return raw


def _writer(path, model, kind, metadata=None, extra=None):
    """A file of `model`'s shapes whose matrices are of one type, with metadata put over the usual ones."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(len(config.layers))
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(config.layers[0].attention.head_dim)
    for key, value in (metadata or {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for name in model.names():
        values = model.tensor(name)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), _blocks_of(values, kind), raw_dtype=kind)
    if extra:
        writer.add_tensor(extra, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_name_of_the_factors_is_llama_cpps():
    assert ROPE_FACTORS == "rope_freqs.weight"
