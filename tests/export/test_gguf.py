"""GGUF files read back with the gguf package: values bit for bit, rows in llama.cpp's order, every key it needs."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from trilemma.core.errors import OutputError, RecipeError, UnsupportedModelError
from trilemma.core.recipe import Recipe, Step
from trilemma.export import EXPORTERS
from trilemma.export.gguf import export_gguf
from trilemma.formats import FORMATS
from trilemma.formats.artifact import load_any
from trilemma.formats.pack import PackedMatrix, pack, unpack
from trilemma.formats.random_weights import with_random_weights
from trilemma.model.config import Experts
from trilemma.model.gguf import gguf_name
from trilemma.model.rope import make_rope
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.schemes import scheme_to_recipe

WIDE = {"dim": 64, "head_dim": 16, "heads": 4, "kv_heads": 2, "ffn": 160, "vocab": 97}
TYPES = {"int8-g32": "Q8_0", "int8-g128": "Q8_0", "int8-channel": "Q8_0", "int4-g32": "Q4_0", "int4-g64": "Q4_0",
         "int4-g128": "Q4_0", "int4-g32-asym": "Q4_1", "int4-g64-asym": "Q4_1", "int4-g128-asym": "Q4_1",
         "int5-g32": "Q5_0", "int5-g32-asym": "Q5_1", "int4-g32-k": "Q4_K", "int5-g32-k": "Q5_K", "int6-g16-k": "Q6_K",
         "int2-g16-k": "Q2_K", "int3-g16-k": "Q3_K", "nl4-g32": "IQ4_NL", "int5-g64": "Q5_0", "int5-g128": "Q5_0",
         "int6-g32": "Q8_0", "int6-g64": "Q8_0", "int6-g128": "Q8_0", "int3-g32": "Q4_0", "int3-g64": "Q4_0",
         "int3-g128": "Q4_0", "int3-g32-asym": "Q4_1", "int3-g64-asym": "Q4_1", "int3-g128-asym": "Q4_1",
         "int2-g32-asym": "Q4_1", "int2-g64-asym": "Q4_1",
         "f32": "F32", "f16": "F16", "bf16": "BF16"}  # fmt: skip


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values = {
        name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
        for name, tensor in tensors.items()
    }
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return tensors, values, fields


def unpermuted(values: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of llama.cpp's own `permute` (convert_hf_to_gguf), written from it."""
    rest = values.shape[1:]
    return values.reshape(heads, values.shape[0] // heads // 2, 2, *rest).swapaxes(1, 2).reshape(values.shape)


def assert_equal_values(model, values, *, permuted: bool) -> None:
    for name in model:
        found, spec = values[gguf_name(name)], model.config.layers[0].attention
        if permuted and ".attention.q." in name:
            found = unpermuted(found, spec.heads)
        if permuted and ".attention.k." in name:
            found = unpermuted(found, spec.kv_heads)
        np.testing.assert_array_equal(found, model.tensor(name), err_msg=name)


@pytest.mark.parametrize("name", [name for name in FORMATS.names() if "g16" not in name or name.endswith("-k")])
def test_every_format_goes_out_bit_for_bit(name, tiny_model, tmp_path):
    wide = {**WIDE, "dim": 256, "head_dim": 64, "ffn": 256} if name.endswith("-k") else WIDE
    model = with_random_weights(tiny_model(**wide, tied=False), lambda _: name, seed=7)
    report = export_gguf(model, tmp_path / "model.gguf")
    tensors, values, _ = read(tmp_path / "model.gguf")
    assert_equal_values(model, values, permuted=True)
    assert {tensors[gguf_name(n)].tensor_type.name for n in model.config.linear_names()} == {TYPES[name]}
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert report.lossless
    assert report.tensor_bytes == sum(tensor.n_bytes for tensor in tensors.values())
    assert report.bytes == (tmp_path / "model.gguf").stat().st_size
    costs_more = any("GGUF keeps a scale for every 32" in note for note in report.notes)
    assert costs_more == (report.tensor_bytes > 1.01 * report.source_bytes)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("technique", ["W8A8-g32", "W4A8-g32", "W4A8-g32-asym", "W4A8-g128-e4"])
def test_what_the_quantizers_make_goes_out_bit_for_bit(technique, tiny_model, tmp_path):
    model = apply_recipe(tiny_model(**WIDE, qkv_bias=True), scheme_to_recipe(technique), Build())
    export_gguf(model, tmp_path / "model.gguf")
    _, values, fields = read(tmp_path / "model.gguf")
    assert_equal_values(model, values, permuted=False)  # qwen2 keeps the order of rows, and has biases
    assert fields["general.architecture"] == "qwen2"
    assert "blk.0.attn_q.bias" in values
    assert "output.weight" not in values  # tied


def test_two_levels_of_scales_go_out_bit_for_bit_each_tensor_in_its_type(tiny_model, tmp_path, random_generator):
    wide = {**WIDE, "dim": 256, "head_dim": 64, "ffn": 288}
    overrides = {
        "layers.0.attention.*": "int5-g32-k",
        "layers.1.*.v.weight": "int6-g16-k",
        "layers.1.*.o.weight": "bf16",
    }
    settings = {"weights": "int4-g32-k", "embedding": "int6-g16-k", "overrides": overrides}
    recipe = Recipe(steps=(Step(technique="gptq", settings=settings),))
    windows = random_generator.integers(0, 97, (4, 32)).astype(np.int32)
    model = apply_recipe(tiny_model(**wide), recipe, Build(calibration=windows))
    report = export_gguf(model, tmp_path / "model.gguf")
    tensors, values, _ = read(tmp_path / "model.gguf")
    assert report.lossless
    assert_equal_values(model, values, permuted=True)
    types = {name: tensors[name].tensor_type.name for name in tensors}
    assert types["token_embd.weight"] == types["blk.1.attn_v.weight"] == "Q6_K"
    assert types["blk.0.attn_q.weight"] == types["blk.0.attn_output.weight"] == "Q5_K"
    assert types["blk.1.attn_k.weight"] == types["blk.0.ffn_up.weight"] == "Q4_K"
    assert types["blk.1.ffn_down.weight"] == "Q4_1"  # rows of 288
    assert types["blk.1.attn_output.weight"] == "BF16"
    back = load_any(tmp_path / "model.gguf")
    for name in model.names():
        if isinstance(stored := model.stored(name), PackedMatrix):
            ours, theirs = stored.parts(), pack(unpacked(back.stored(name))).parts()
            assert ours.keys() == theirs.keys()
            assert all(ours[part].tobytes() == theirs[part].tobytes() for part in ours), name


def unpacked(stored):
    return unpack(stored) if isinstance(stored, PackedMatrix) else stored


def test_rows_that_are_no_multiple_of_32_go_out_as_f32_and_the_report_says_so(tiny_model, tmp_path):
    model = apply_recipe(tiny_model(**{**WIDE, "ffn": 172}), scheme_to_recipe("W4A8-g32"), Build())
    report = export_gguf(model, tmp_path / "model.gguf")
    tensors, values, _ = read(tmp_path / "model.gguf")
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "F32"
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == "Q4_0"
    assert_equal_values(model, values, permuted=True)
    assert any("172" in note for note in report.notes)


def test_rows_that_are_no_multiple_of_256_go_out_as_f32_where_the_type_has_blocks_of_256(tiny_model, tmp_path):
    model = with_random_weights(tiny_model(**WIDE), lambda _: "int6-g16-k", seed=7)
    report = export_gguf(model, tmp_path / "model.gguf")
    tensors, values, _ = read(tmp_path / "model.gguf")
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "F32"
    assert_equal_values(model, values, permuted=True)
    assert any("no multiple of 256" in note for note in report.notes)


def test_formats_without_a_type_are_refused_or_stored_again(tiny_model, tmp_path, monkeypatch):
    odd = FORMATS.get("int8-g32").model_copy(update={"name": "int8-g24", "group": 24})
    monkeypatch.setitem(FORMATS._targets, "int8-g24", "tests:nowhere")
    monkeypatch.setitem(FORMATS._loaded, "int8-g24", odd)
    model = with_random_weights(tiny_model(**WIDE), lambda n: "int8-g24" if "ffn.up" in n else "int8-g32", seed=1)
    with pytest.raises(RecipeError, match=r"ffn\.up\.weight.*int8-g24.*int8 in groups of 32"):
        export_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
    report = export_gguf(model, tmp_path / "model.gguf", requantize=True)
    assert not report.lossless
    assert any("loss" in note and "relative error" in note for note in report.notes)
    _, values, _ = read(tmp_path / "model.gguf")
    wanted = model.tensor("layers.0.ffn.up.weight")
    assert 0 < np.abs(values["blk.0.ffn_up.weight"] - wanted).max() < 0.02 * np.abs(wanted).max()


def test_metadata_says_what_llama_cpp_reads(tiny_model, tmp_path):
    model = tiny_model(dim=48, head_dim=20, ffn=96, theta=5e5)
    export_gguf(model, tmp_path / "model.gguf")
    _, _, fields = read(tmp_path / "model.gguf")
    wanted = {
        "general.architecture": "llama", "llama.context_length": 64, "llama.embedding_length": 48,
        "llama.block_count": 2, "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 20, "llama.attention.value_length": 20,
        "llama.rope.freq_base": 5e5, "llama.rope.dimension_count": 20, "llama.vocab_size": 97,
        "general.file_type": 0,
    }  # fmt: skip
    for key, value in wanted.items():
        assert fields[key] == value, key
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert fields["tokenizer.ggml.model"] == "no_vocab"


def with_rope(model, rope, **changes):
    layers = tuple(
        layer.model_copy(update={"attention": layer.attention.model_copy(update={"rope": rope, **changes})})
        for layer in model.config.layers
    )
    return model.with_config(model.config.model_copy(update={"layers": layers}))


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32.0}


def test_llama3_rope_scaling_becomes_a_tensor_of_divisors(tiny_model, tmp_path):
    rope = make_rope("llama3", 1e4, LLAMA3, head_dim=16)
    export_gguf(with_rope(tiny_model(**WIDE), rope), tmp_path / "model.gguf")
    _, values, fields = read(tmp_path / "model.gguf")
    plain = make_rope("default", 1e4, {}, head_dim=16)
    found = np.asarray(plain.inverse_frequencies) / values["rope_freqs.weight"]
    np.testing.assert_allclose(found, rope.inverse_frequencies, rtol=1e-6)
    assert values["rope_freqs.weight"].max() == pytest.approx(32)
    assert "llama.rope.scaling.type" not in fields


def test_linear_and_yarn_scaling_are_said_in_metadata(tiny_model, tmp_path):
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32.0}
    for kind, parameters in (("linear", {"factor": 2.0}), ("yarn", yarn)):
        path = tmp_path / f"{kind}.gguf"
        export_gguf(with_rope(tiny_model(**WIDE), make_rope(kind, 1e4, parameters, head_dim=16)), path)
        _, values, fields = read(path)
        assert fields["llama.rope.scaling.type"] == kind
        assert fields["llama.rope.scaling.factor"] == parameters["factor"]
        assert "rope_freqs.weight" not in values
    assert fields["llama.rope.scaling.original_context_length"] == 32


def without_attention(model):
    first, *rest = model.config.layers
    return model.with_config(
        model.config.model_copy(update={"layers": (first.model_copy(update={"attention": None}), *rest)})
    )


def with_layers(model, **changes):
    layers = tuple(layer.model_copy(update=changes) for layer in model.config.layers)
    return model.with_config(model.config.model_copy(update={"layers": layers}))


def with_ffn(model, **changes):
    layers = tuple(
        layer.model_copy(update={"ffn": layer.ffn.model_copy(update=changes)}) for layer in model.config.layers
    )
    return model.with_config(model.config.model_copy(update={"layers": layers}))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_attention, "without attention"),
        (lambda m: with_layers(m, parallel=True), "side by side"),
        (lambda m: with_layers(m, post_norms=True), "norms behind"),
        (lambda m: with_layers(m, ffn=Experts(count=2, active=1, hidden=32)), "experts"),
        (lambda m: m.with_config(m.config.model_copy(update={"norm": "layer"})), "RMS norms"),
        (lambda m: m.with_config(m.config.model_copy(update={"embedding_scale": 2.0})), "scaled embedding"),
        (lambda m: m.with_config(m.config.model_copy(update={"learned_positions": True})), "learned positions"),
        (lambda m: with_rope(m, m.config.layers[0].attention.rope, qk_norm=True), "norms of q and k in llama"),
        (lambda m: m.with_config(m.config.model_copy(update={"family": "qwen3"})), "without norms of q and k"),
        (lambda m: with_ffn(m, activation="gelu"), "SiLU"),
        (lambda m: with_rope(m, None), "rotate"),
        (lambda m: with_rope(m, m.config.layers[0].attention.rope, scale=0.5), "scale"),
        (lambda m: m.with_config(m.config.model_copy(update={"family": "mamba"})), "mamba"),
        (
            lambda m: with_rope(
                m.with_config(m.config.model_copy(update={"family": "qwen2"})),
                make_rope("llama3", 1e4, LLAMA3, head_dim=16),
            ),
            "llama3",
        ),
    ],
)
def test_what_gguf_can_not_express_is_refused(change, why, tiny_model, tmp_path):
    with pytest.raises(UnsupportedModelError, match=why):
        export_gguf(change(tiny_model(**WIDE)), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_layers_may_have_different_widths(tiny_model, tmp_path):
    model = tiny_model(**WIDE)
    first, second = model.config.layers
    narrow = second.model_copy(update={"ffn": second.ffn.model_copy(update={"hidden": 96})})
    config = model.config.model_copy(update={"layers": (first, narrow)})
    changed = model.with_config(config).with_tensors(
        {
            f"layers.1.ffn.{role}.weight": np.zeros(shape, np.float32)
            for role, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96)))
        }
    )
    export_gguf(changed, tmp_path / "model.gguf")
    _, _, fields = read(tmp_path / "model.gguf")
    assert list(fields["llama.feed_forward_length"]) == [160, 96]


def test_the_shipped_models_tokenizer_goes_along(hearth_path, tmp_path):
    report = EXPORTERS.get("gguf")(load_any(hearth_path), tmp_path / "model.gguf")
    _, _, fields = read(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 8192
    assert fields["tokenizer.ggml.merges"][0] == "Ġ t"
    assert fields["tokenizer.ggml.token_type"][0] == 3  # control: <|endoftext|>
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 0)
    assert fields["tokenizer.ggml.add_bos_token"]
    assert not report.notes


@pytest.mark.shared
def test_a_sentencepiece_like_tokenizer_goes_along(shared_dir, tmp_path):
    export_gguf(load_any(shared_dir / "models" / "stories260K"), tmp_path / "model.gguf")
    _, _, fields = read(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    types = fields["tokenizer.ggml.token_type"]
    assert (types[0], types[1], types[3], types[258], types[259]) == (2, 3, 6, 6, 1)
    assert fields["tokenizer.ggml.unknown_token_id"] == 0
    assert fields["tokenizer.ggml.add_space_prefix"]
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    assert scores[tokens.index("▁t")] > scores[tokens.index("he")]


def test_a_full_disk_leaves_the_old_file(tiny_model, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    export_gguf(tiny_model(**WIDE), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError, match="No space left"):
        export_gguf(tiny_model(**WIDE, seed=1), path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["model.gguf"]
    with pytest.raises(OutputError, match="No such file"):
        export_gguf(tiny_model(**WIDE), tmp_path / "nowhere" / "model.gguf")
