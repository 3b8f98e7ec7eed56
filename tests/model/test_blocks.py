"""The schema's parts that families combine, each against a computation by hand in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit

from trilemma.model.blocks import LayerNorm, RmsNorm
from trilemma.model.config import Dense
from trilemma.model.decoder import Decoder, canonical_tensors, decoder_to_model, layer_from_model


def _silu(x: np.ndarray) -> np.ndarray:
    return x * expit(x)


def _gated(model, prefix: str, x: np.ndarray) -> np.ndarray:
    gate, up, down = (model.tensor(f"{prefix}.{role}.weight").astype(np.float64) for role in ("gate", "up", "down"))
    return (_silu(x @ gate.T) * (x @ up.T)) @ down.T


def _experts_by_hand(model, spec, x: np.ndarray) -> np.ndarray:
    """One token at a time, as the docstring of Experts says."""
    router = model.tensor("layers.0.ffn.router.weight").astype(np.float64)
    out = np.zeros_like(x)
    for row, token in enumerate(x):
        scores = router @ token
        if spec.router == "glu":
            scores = np.abs(_silu(scores[: spec.count]) * scores[spec.count :])
        chosen = sorted(range(spec.count), key=lambda e: (-scores[e], e))[: spec.active]
        over = scores if spec.gates == "softmax" else scores[chosen]
        total = np.exp(over - over.max()).sum()
        for expert in sorted(chosen):
            gate = 1.0 if spec.gates == "one" else np.exp(scores[expert] - over.max()) / total
            out[row] += gate * _gated(model, f"layers.0.ffn.experts.{expert}", token)
        if spec.shared_hidden:
            out[row] += _gated(model, "layers.0.ffn.shared", token)
        if spec.down_bias:
            out[row] += model.tensor("layers.0.ffn.down.bias")
    return out


@pytest.mark.parametrize("router", ["linear", "glu"])
@pytest.mark.parametrize("gates", ["normalized", "softmax", "one"])
@pytest.mark.parametrize("rest", [{}, {"shared_hidden": 21, "down_bias": True}, {"active": 5}, {"active": 1}])
def test_experts_by_hand(router, gates, rest, experts_config, random_model, random_generator):
    config = experts_config(router=router, gates=gates, **rest)
    model = random_model(config, int(random_generator.integers(2**31)))
    ffn = layer_from_model(model, 0, dtype=torch.float64).ffn
    x = random_generator.standard_normal((2, 7, config.dim))
    with torch.no_grad():
        found = ffn(torch.from_numpy(x)).numpy()
    expected = _experts_by_hand(model, config.layers[0].ffn, x.reshape(-1, config.dim)).reshape(x.shape)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_all_experts_with_gate_one_are_the_dense_block(tiny_model, experts_config, random_generator):
    """A dense block cut into experts along its hidden units, all of them active, computes the same."""
    dense = tiny_model(seed=4, ffn=80)
    config = experts_config(count=4, active=4, hidden=16, shared_hidden=16, gates="one")
    pieces, unit = {}, 16
    for index in range(len(config.layers)):
        for number, block in enumerate(["shared", *(f"experts.{e}" for e in range(4))]):
            cut = slice(number * unit, (number + 1) * unit)
            for role in ("gate", "up", "down"):
                whole = dense.tensor(f"layers.{index}.ffn.{role}.weight")
                pieces[f"layers.{index}.ffn.{block}.{role}.weight"] = whole[:, cut] if role == "down" else whole[cut]
        pieces[f"layers.{index}.ffn.router.weight"] = random_generator.standard_normal((4, 48)).astype(np.float32)
    mixed = dense.with_config(config).with_tensors(pieces)
    tokens = torch.from_numpy(random_generator.integers(0, 97, (2, 19)))
    with torch.no_grad():
        assert (Decoder.from_model(mixed)(tokens) - Decoder.from_model(dense)(tokens)).abs().max() < 1e-4


def test_ties_go_to_the_lower_index(experts_config, random_model):
    model = random_model(experts_config(count=5, active=2), 1)
    model = model.with_tensors({"layers.0.ffn.router.weight": np.ones((5, 48), np.float32)})
    chosen, gates = layer_from_model(model, 0).ffn.route(torch.ones(3, 48))
    assert chosen.tolist() == [[0, 1]] * 3
    assert gates.tolist() == [[0.5, 0.5]] * 3


def test_experts_learn_and_go_back_to_a_model(experts_config, random_model):
    model = random_model(experts_config(shared_hidden=8, down_bias=True), 2)
    decoder = Decoder.from_model(model, gradient_checkpointing=True).train()
    decoder(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logsumexp(-1).sum().backward()
    assert decoder.layers[0].ffn.router.weight.grad.abs().sum() > 0
    assert decoder.layers[1].ffn.down.bias.grad.abs().sum() > 0
    assert dict(canonical_tensors(decoder)).keys() == model.config.tensor_shapes().keys()
    back = decoder_to_model(decoder, "bf16")
    assert back.format_of("layers.0.ffn.experts.3.down.weight") == "bf16"
    fresh = Decoder(model.config)
    fresh.initialize(seed=1)
    assert all(torch.isfinite(p).all() for p in fresh.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_norms(bias, random_generator):
    x = random_generator.standard_normal((2, 5, 13))
    weight, shift = random_generator.standard_normal((2, 13))
    for kind in (RmsNorm, LayerNorm):
        norm = kind(13, 1e-3, bias=bias).double()
        norm.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(shift)}, strict=bias)
        centred = x - x.mean(-1, keepdims=True) if kind is LayerNorm else x
        expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * weight + bias * shift
        np.testing.assert_allclose(norm(torch.from_numpy(x)).detach().numpy(), expected, rtol=2e-5, atol=1e-6)


def test_bias_of_the_last_matrix_alone(tiny_model, random_model, random_generator):
    config = tiny_model().config
    layer = config.layers[0].model_copy(
        update={"ffn": Dense(hidden=23, gated=False, activation="relu", down_bias=True)}
    )
    model = random_model(config.model_copy(update={"layers": (layer,)}), 5)
    assert "layers.0.ffn.up.bias" not in model.names()
    x = random_generator.standard_normal((3, config.dim))
    up, down, bias = (model.tensor(f"layers.0.ffn.{name}") for name in ("up.weight", "down.weight", "down.bias"))
    with torch.no_grad():
        found = layer_from_model(model, 0, dtype=torch.float64).ffn(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, np.maximum(x @ up.T, 0) @ down.T + bias, atol=1e-6)
