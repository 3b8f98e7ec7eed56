"""What experts cost, against counts made by hand and against what torch executes."""

from __future__ import annotations

import pytest
import torch

from trilemma.model import cost
from trilemma.model.decoder import Decoder

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
    assert cost.expert_shares(config)["layers.1.ffn.experts.4.down.weight"] == 1
