"""GGUF headers against the `gguf` package as the independent writer; damaged files end in one clear error."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.model.config import Experts
from trilemma.model.gguf import (
    GGML_TYPES,
    find_gguf,
    gguf_config,
    gguf_name,
    gguf_types,
    read_gguf_header,
    type_bits,
)

DIM, HIDDEN, VOCAB, LAYERS, HEADS, KV = 64, 96, 130, 3, 4, 2


def write(path, *, experts=0, bias=False, tied=True, wide_layer=None, kind=gguf.GGMLQuantizationType.Q4_0):
    """A llama-shaped file; the data of its tensors is zeros."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(77)
    writer.add_embedding_length(DIM)
    writer.add_block_count(LAYERS)
    writer.add_head_count([HEADS, HEADS, KV] if wide_layer is None else HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(16)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_rope_freq_base(5000.0)
    writer.add_token_list([f"<{i}>" for i in range(VOCAB)])
    writer.add_token_scores([0.5] * VOCAB)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)

    def add(name, *shape):
        if len(shape) == 1:
            writer.add_tensor(name, np.zeros(shape, np.float32))
            return
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor(name, np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8), raw_dtype=kind)

    add("token_embd.weight", VOCAB, DIM)
    for i in range(LAYERS):
        heads = HEADS if wide_layer is not None or i < 2 else KV
        add(f"blk.{i}.attn_norm.weight", DIM)
        add(f"blk.{i}.ffn_norm.weight", DIM)
        add(f"blk.{i}.attn_q.weight", heads * 16, DIM)
        add(f"blk.{i}.attn_k.weight", KV * 16, DIM)
        add(f"blk.{i}.attn_v.weight", KV * 16, DIM)
        add(f"blk.{i}.attn_output.weight", DIM, heads * 16)
        if bias:
            for role, rows in (("q", heads * 16), ("k", KV * 16), ("v", KV * 16)):
                add(f"blk.{i}.attn_{role}.bias", rows)
        if experts:
            add(f"blk.{i}.ffn_gate_inp.weight", experts, DIM)
            for role, shape in (("gate", (HIDDEN, DIM)), ("up", (HIDDEN, DIM)), ("down", (DIM, HIDDEN))):
                add(f"blk.{i}.ffn_{role}_exps.weight", experts, *shape)
        else:
            add(f"blk.{i}.ffn_gate.weight", HIDDEN, DIM)
            add(f"blk.{i}.ffn_up.weight", HIDDEN, DIM)
            add(f"blk.{i}.ffn_down.weight", DIM, HIDDEN)
    add("output_norm.weight", DIM)
    if not tied:
        add("output.weight", VOCAB, DIM)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_types_are_those_of_the_package():
    for number, (name, block, size) in GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (block, size))
        assert type_bits(name) == pytest.approx(8 * size / block)


@pytest.mark.parametrize("options", [{}, {"bias": True, "tied": False}, {"experts": 3}, {"wide_layer": 1}])
def test_the_structure_is_what_was_written(tmp_path, options):
    header = read_gguf_header(write(tmp_path / "model.gguf", **options))
    config = gguf_config(header)
    assert (config.dim, config.vocab_size, config.max_context, len(config.layers)) == (DIM, VOCAB, 77, LAYERS)
    assert config.tied is options.get("tied", True)
    first = config.layers[0].attention
    assert (first.heads, first.kv_heads, first.head_dim, first.qkv_bias) == (HEADS, KV, 16, options.get("bias", False))
    assert config.layers[2].attention.heads == (KV if "wide_layer" not in options else HEADS)
    assert first.rope.theta == 5000.0
    if "experts" in options:
        assert config.layers[1].ffn == Experts(count=3, active=2, hidden=HIDDEN)
    assert set(gguf_types(header, config).values()) == {"Q4_0"}
    # every tensor of the file is one of the config's, and its bytes are those of the package's own reader
    assert {gguf_name(name) for name in config.tensor_shapes()} == set(header.tensors)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert header.weights_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert header.array_lengths["tokenizer.ggml.tokens"] == VOCAB


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path, random_generator):
    whole = write(tmp_path / "model.gguf").read_bytes()
    header_end = whole.index(b"output_norm.weight") + 30
    for size in [0, 3, 8, 20, *random_generator.integers(24, header_end, 40)]:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[: int(size)])
        with pytest.raises(CheckpointError):
            read_gguf_header(cut)


@pytest.mark.parametrize(("position", "value"), [(8, 2**60), (16, 2**60), (4, 99)])
def test_counts_and_versions_that_can_not_be_are_refused(tmp_path, position, value):
    data = bytearray(write(tmp_path / "model.gguf").read_bytes())
    form = "<I" if position == 4 else "<Q"
    data[position : position + struct.calcsize(form)] = struct.pack(form, value)
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError):
        read_gguf_header(tmp_path / "model.gguf")


def test_a_string_longer_than_the_file_is_refused(tmp_path):
    data = bytearray(write(tmp_path / "model.gguf").read_bytes())
    data[24:32] = struct.pack("<Q", 1 << 40)  # the first key's length
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_gguf_header(tmp_path / "model.gguf")


def test_an_unknown_architecture_names_the_known_ones(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="qwen2"):
        gguf_config(read_gguf_header(tmp_path / "x.gguf"))


def test_metadata_that_contradict_the_tensors_are_refused(tmp_path):
    header = read_gguf_header(write(tmp_path / "model.gguf"))
    wrong = header.model_copy(update={"metadata": {**header.metadata, "llama.attention.key_length": 8}})
    with pytest.raises(CheckpointError, match="attn_q"):
        gguf_config(wrong)


def test_a_folder_means_its_only_model(tmp_path, hearth_path):
    assert find_gguf(hearth_path) is None
    assert find_gguf(tmp_path) is None
    one = write(tmp_path / "a.gguf")
    assert find_gguf(tmp_path) == one
    write(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"2 GGUF models"):
        find_gguf(tmp_path)


def test_a_file_of_the_magic_alone_is_refused(tmp_path):
    from trilemma.formats.artifact import load_any

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="ends inside its header"):
        load_any(tmp_path / "model.gguf")
