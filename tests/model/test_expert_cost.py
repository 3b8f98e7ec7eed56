"""What experts cost, against counts made by hand and against what torch executes."""

from __future__ import annotations

import pytest
import torch

from trilemma.model import cost
from trilemma.model.decoder import Decoder
from trilemma.model.families import family_of

# tiny_config: dim 48, 2 layers, 4 heads and 2 KV heads of 16, vocabulary 97, tied; experts: 5 of width 27, 2 active
ATTENTION = 48 * (64 + 32 + 32) + 64 * 48
EXPERT = 3 * 48 * 27
ROUTER = 5 * 48


def test_parameters_by_hand(experts_config, random_model):
    found = cost.inspect_model(random_model(experts_config(), 0))
    norms = 48 * 5
    assert found.parameters == 97 * 48 + 2 * (ATTENTION + ROUTER + 5 * EXPERT) + norms
    assert found.active_parameters == 97 * 48 + 2 * (ATTENTION + ROUTER + 2 * EXPERT) + norms
    assert found.parameters_by_role["ffn"] == 2 * (ROUTER + 5 * EXPERT)
    assert "ffn 2 of 5 experts x 27" in found.architecture


# (config.json of a published model, its parameters as the hub states them, those active for a token)
PUBLISHED = [
    ({"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
      "num_key_value_heads": 8, "num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2,
      "vocab_size": 32000}, 46_702_792_704, 12.9e9),
    ({"model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32,
      "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 48, "num_experts": 128,
      "num_experts_per_tok": 8, "vocab_size": 151936}, 30_532_122_624, 3.35e9),
    ({"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}, 124_439_808, 124_439_808),
    ({"model_type": "gpt_neox", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
      "num_hidden_layers": 12, "vocab_size": 50304}, 162_322_944, 162_322_944),  # Pythia-160m
    ({"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
      "num_hidden_layers": 32, "vocab_size": 32064}, 3_821_079_552, 3_821_079_552),  # Phi-3-mini
    ({"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
      "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 26, "vocab_size": 262144},
     999_885_952, 999_885_952),
    ({"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
      "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28, "vocab_size": 151936,
      "tie_word_embeddings": True}, 596_049_920, 596_049_920),
]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "parameters", "active"), PUBLISHED, ids=lambda v: v["model_type"] if isinstance(v, dict) else ""
)
def test_published_counts(raw, parameters, active):
    config = family_of(raw).read_config(raw)
    assert cost.parameter_count(config) == parameters
    assert cost.active_parameter_count(config) == pytest.approx(active, rel=0.002)


def test_a_dense_model_uses_all_it_has(tiny_model):
    found = cost.inspect_model(tiny_model())
    assert found.active_parameters == found.parameters


@pytest.mark.parametrize("options", [{}, {"shared_hidden": 20, "router": "glu", "active": 3, "down_bias": True}])
def test_macs_are_those_that_torch_executes(options, experts_config):
    from torch.utils.flop_counter import FlopCounterMode

    config, time = experts_config(**options), 23
    decoder = Decoder(config)
    decoder.initialize()
    tokens = torch.arange(time)[None]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(tokens)
    assert counter.get_total_flops() == 2 * time * cost.macs_per_token(config, time)


def test_decode_reads_active_experts_and_one_position(experts_config):
    config = experts_config(shared_hidden=20)
    vectors = 48 * 5
    shared = 3 * 48 * 20
    read = 97 * 48 + 2 * (ATTENTION + ROUTER + shared + 2 * EXPERT) + vectors
    assert cost.decode_bytes_per_token(config, lambda _: "f32", "none", 9) == 4 * read
    positioned = config.model_copy(update={"learned_positions": True})
    assert cost.decode_bytes_per_token(positioned, lambda _: "f32", "none", 9) == 4 * (read + 48)
    assert cost.weights_bytes(positioned, lambda _: "f32") == cost.weights_bytes(config, lambda _: "f32") + 64 * 48 * 4


def test_all_active_cost_what_all_experts_cost(experts_config):
    config = experts_config(active=5)
    assert cost.active_parameter_count(config) == cost.parameter_count(config)
