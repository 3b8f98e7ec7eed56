"""Products of a layer under calibration: rounded inputs, bf16 where the model runs in no more, f32 where it does."""

import gc
import weakref

import numpy as np
import pytest
import torch

from trilemma.model.decoder import layer_from_model
from trilemma.model.model import LinearRun
from trilemma.techniques.products import has_fast_bf16, prepare_products, round_activations


def bf16(values):
    """Rounded to 8 bits of significand, half to even, by integers alone."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def runs_of(config, activation):
    return {name: LinearRun(activation=activation) for name in config.linear_names()}


@pytest.mark.parametrize("activation", ["bf16", "int8-g32"])
def test_a_product_is_that_of_its_rounded_operands(activation, tiny_model, random_generator, monkeypatch):
    monkeypatch.setattr("trilemma.techniques.products.has_fast_bf16", lambda device: True)
    model = tiny_model(seed=4)
    layer = layer_from_model(model, 1)
    prepare_products(layer, 1, runs_of(model.config, activation))
    x = random_generator.standard_normal((3, 5, model.config.dim)).astype(np.float32)
    seen = round_activations(torch.from_numpy(x)).numpy() if activation == "int8-g32" else x
    wanted = bf16(seen).astype(np.float64) @ bf16(model.tensor("layers.1.attention.q.weight")).astype(np.float64).T
    with torch.no_grad():
        found = layer.attention.q(torch.from_numpy(x))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2**-8, atol=2**-8 * np.abs(wanted).max())


@pytest.mark.parametrize(("activation", "fast"), [("f32", True), ("bf16", False), (None, True)])
def test_f32_stays_exact(activation, fast, tiny_model, random_generator, monkeypatch):
    """Where runs say so or nothing, and where the processor knows no bf16."""
    monkeypatch.setattr("trilemma.techniques.products.has_fast_bf16", lambda device: fast)
    model = tiny_model(seed=5)
    x = torch.from_numpy(random_generator.standard_normal((2, 9, model.config.dim)).astype(np.float32))
    plain, prepared = layer_from_model(model, 0), layer_from_model(model, 0)
    prepare_products(prepared, 0, {} if activation is None else runs_of(model.config, activation))
    with torch.no_grad():
        assert torch.equal(plain(x), prepared(x))


def test_a_layer_goes_as_soon_as_nobody_holds_it(tiny_model, monkeypatch):
    """Layers are most of the memory of calibration, and cycles may wait long to be found."""
    monkeypatch.setattr("trilemma.techniques.products.has_fast_bf16", lambda device: True)
    model = tiny_model(seed=6)
    layer = layer_from_model(model, 0)
    prepare_products(layer, 0, runs_of(model.config, "int8-g32"))
    parameters = [weakref.ref(parameter) for parameter in layer.parameters()]
    gc.disable()
    try:
        del layer
        assert not any(held() is not None for held in parameters)
    finally:
        gc.enable()


def test_bf16_is_for_devices_known_to_be_fast_at_it(monkeypatch):
    cpu = torch.device("cpu")
    for found, wanted in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert has_fast_bf16(cpu) is wanted
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_fast_bf16(cpu)
    assert not has_fast_bf16(torch.device("meta"))
