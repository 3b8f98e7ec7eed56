"""Arithmetic against what transformers and the modules themselves count."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from trilemma.core.errors import InputError
from trilemma.model import cost
from trilemma.model.checkpoint import read_checkpoint
from trilemma.model.decoder import Decoder

# number of parameters that the model cards and safetensors metadata of the hub state
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "Qwen2.5-0.5B": 494_032_768,
    "Llama-3.2-1B": 1_235_814_400,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_of_published_models(shapes_path, name, parameters):
    model = read_checkpoint(shapes_path / name)
    seen = cost.inspect_model(model)
    assert seen.parameters == sum(seen.parameters_by_role.values()) == parameters
    assert seen.random
    vectors = sum(shape[0] for shape in model.config.tensor_shapes().values() if len(shape) == 1)
    assert seen.weights_bytes == 2 * parameters + 2 * vectors  # bf16 matrices, f32 vectors
    assert seen.dtype == "bf16"
    assert (
        max(seen.kv_bytes["bf16"])
        == json.loads((shapes_path / name / "config.json").read_text())["max_position_embeddings"]
    )


def test_roles_partition_the_parameters(tiny_model):
    config = tiny_model(tied=False, qkv_bias=True, layers=3).config
    with torch.device("meta"):
        decoder = Decoder(config)
    by_role = cost.parameters_by_role(config)
    assert sum(by_role.values()) == sum(p.numel() for p in decoder.parameters()) == cost.parameter_count(config)
    assert by_role["norms"] == 7 * config.dim
    assert by_role["attention"] == sum(p.numel() for layer in decoder.layers for p in layer.attention.parameters())
    assert by_role["ffn"] == sum(p.numel() for layer in decoder.layers for p in layer.ffn.parameters())
    assert by_role["head"] == by_role["embedding"] == config.vocab_size * config.dim


@pytest.mark.parametrize("tied", [True, False])
def test_macs_are_those_that_torch_executes(tiny_model, tied):
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_model(tied=tied).config
    decoder = Decoder(config)
    time = 24
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(torch.zeros((1, time), dtype=torch.int64))
    # prefill computes all pairs of positions, so every token is charged a context of `time`
    expected = time * cost.macs_per_token(config, time)
    assert counter.get_total_flops() == 2 * expected


def test_windows_bound_attention_macs(tiny_model):
    config = tiny_model().config
    attention = config.layers[0].attention
    windowed = config.layers[0].model_copy(update={"attention": attention.model_copy(update={"window": 10})})
    changed = config.model_copy(update={"layers": (windowed, config.layers[1])})
    assert cost.attention_macs_per_token(changed, 8) == cost.attention_macs_per_token(config, 8)
    full = cost.attention_macs_per_token(config, 40)
    assert cost.attention_macs_per_token(changed, 40) == full / 2 + full / 2 * 10 / 40


def test_kv_bytes(tiny_model):
    config = tiny_model().config  # 2 layers, 2 KV heads of 16
    assert cost.kv_bytes_per_token(config, "none") == 0
    assert cost.kv_bytes_per_token(config, "f32") == 2 * 2 * 2 * 16 * 4
    assert cost.kv_bytes_per_token(config, "bf16") == 2 * 2 * 2 * 16 * 2
    assert cost.kv_bytes_per_token(config, "int8") == 2 * 2 * 2 * (16 + 4)
    assert cost.kv_bytes_per_token(config, "int4") == 2 * 2 * 2 * (8 + 4)
    assert cost.kv_bytes(config, "bf16", 100) == 100 * 256
    with pytest.raises(InputError, match=r"'fp8'.*none, f32, bf16, int8, int4"):
        cost.kv_bytes_per_token(config, "fp8")


def test_bytes_by_format(tiny_model):
    config = tiny_model(tied=False).config
    matrices = sum(int(np.prod(s)) for s in config.tensor_shapes().values() if len(s) == 2)
    vectors = sum(s[0] for s in config.tensor_shapes().values() if len(s) == 1)
    assert cost.weights_bytes(config, lambda _: "bf16") == 2 * matrices + 4 * vectors
    seen = []

    def half_byte(name: str, shape: tuple[int, int]) -> int:
        seen.append(name)
        return shape[0] * shape[1] // 2

    mixed = cost.weights_bytes(config, lambda name: "f32" if name == "head.weight" else "int4-g32", half_byte)
    head = config.vocab_size * config.dim
    assert mixed == 4 * head + (matrices - head) // 2 + 4 * vectors
    assert set(seen) == {"int4-g32"}
    with pytest.raises(InputError, match="int4-g32"):
        cost.weights_bytes(config, lambda _: "int4-g32")


def test_decode_reads_one_embedding_row(tiny_model):
    tied, untied = tiny_model(tied=True).config, tiny_model(tied=False).config
    row = 4 * tied.dim
    assert cost.decode_bytes_per_token(untied, lambda _: "f32", "none", 9) == row + cost.decode_bytes_per_token(
        tied, lambda _: "f32", "none", 9
    )


def test_inspection_reads_no_weights(hearth_path, monkeypatch):
    from trilemma.model.sources import CheckpointSource

    monkeypatch.setattr(CheckpointSource, "read", lambda *_: pytest.fail("weights were read"))
    seen = cost.inspect_model(read_checkpoint(hearth_path))
    assert seen.parameters == 6_819_072
    assert seen.architecture == "llama, 6 layers x 256, 8 heads (4 KV) x 32, ffn 768, vocabulary 8192, tied"
    assert seen.kv_bytes["bf16"][512] == 512 * 6 * 2 * 4 * 32 * 2
    assert list(seen.macs_per_token) == [128, 512]
    assert not seen.random
