"""Forecasts from headers: the counts behind them by hand, the schemes' order, what can not be asked."""

from __future__ import annotations

import pytest

from trilemma.core.device import load_device
from trilemma.core.errors import InputError, RecipeError
from trilemma.formats.artifact import load_any
from trilemma.model.cost import kv_bytes_per_token, macs_per_token, weights_bytes
from trilemma.search.forecast import AS_IT_IS, demand_of, forecast_model, forecast_schemes, form_of


@pytest.fixture(scope="module")
def hearth(hearth_path):
    return load_any(hearth_path)


def prompt_by_hand(tokens):
    """hearth-7m: 6 layers, 256 wide, 8 heads and 4 KV heads of 32, blocks of 768.

    The last layer sees one token through; of the others it makes keys and values.
    """
    keys = 2 * 256 * 128
    layer = 2 * 256 * 256 + keys + 3 * 256 * 768
    attention = 2 * 8 * 32 * (5 * tokens * (tokens // 2) + tokens)
    return tokens * (5 * layer + keys) + layer - keys + attention


def test_demand_by_hand(hearth):
    config = hearth.config
    found = demand_of(hearth, form_of(hearth, AS_IT_IS), 100, 20)
    size = weights_bytes(config, hearth.format_of)
    each = kv_bytes_per_token(config, "bf16")
    assert found.weights_bytes == size
    assert found.kv_bytes == 120 * each
    assert found.read_bytes == size + 110 * each  # tied: every byte is read
    assert set(found.macs) == {"f32"}  # a bf16 checkpoint multiplies in f32
    assert found.macs["f32"] == pytest.approx(macs_per_token(config, 110))
    head = config.vocab_size * config.dim
    assert found.prefill_macs["f32"] == pytest.approx(prompt_by_hand(100) + head)


def test_int8_products_are_counted_as_such(hearth):
    found = demand_of(hearth, form_of(hearth, "W4A8-g32-kv8"), 64, 8)
    config = hearth.config
    matrices = macs_per_token(config, 68) - sum(
        2 * x.attention.heads * x.attention.head_dim * 68 for x in config.layers
    )
    assert found.macs["int8"] == pytest.approx(matrices)
    assert found.kv_bytes == 72 * kv_bytes_per_token(config, "int8")


def test_without_a_cache_every_step_does_the_history_again(hearth):
    cached = demand_of(hearth, form_of(hearth, AS_IT_IS), 64, 8)
    none = hearth.with_run(hearth.run.model_copy(update={"kv_cache": "none"}))
    again = demand_of(none, form_of(none, AS_IT_IS), 64, 8)
    head = hearth.config.vocab_size * hearth.config.dim
    assert again.kv_bytes == 0
    assert again.macs["f32"] == pytest.approx(head + prompt_by_hand(68))
    assert again.macs["f32"] > 30 * cached.macs["f32"]


def test_smaller_forms_cost_less(hearth):
    device = load_device("raspberry-pi-5")
    found = forecast_schemes(hearth, device, schemes=["f32", "bf16", "W8A8-g32", "W4A8-g32"], context=256)
    for metric in ("tpot_s", "energy_j_per_output_token"):
        values = [forecast.measurements[metric].value for forecast in found.values()]
        assert values == sorted(values, reverse=True)


def test_a_longer_context_costs_more(hearth):
    device = load_device("phone")
    short, long = (
        forecast_model(hearth, device, prompt_tokens=n, output_tokens=16).measurements["tpot_s"].value
        for n in (16, 400)
    )
    assert long > short


def test_of_experts_only_the_active_are_read_and_multiplied(experts_config, random_model):
    few, all_ = (random_model(experts_config(active=active)) for active in (2, 5))
    form, full = form_of(few, AS_IT_IS), form_of(all_, AS_IT_IS)
    some, every = demand_of(few, form, 20, 8), demand_of(all_, full, 20, 8)
    assert some.weights_bytes == every.weights_bytes  # all of them lie in memory
    config = few.config
    experts = [name for name in config.linear_names() if ".experts." in name]
    sizes = sum(config.tensor_shapes()[name][0] * config.tensor_shapes()[name][1] for name in experts)
    assert every.macs["f32"] - some.macs["f32"] == pytest.approx(sizes * 3 / 5)
    assert some.macs["f32"] == pytest.approx(macs_per_token(config, 24), rel=1e-3)
    assert every.read_bytes - some.read_bytes == pytest.approx(4 * sizes * 3 / 5, rel=1e-3)


@pytest.mark.parametrize("context", [10, 513])
def test_lengths_that_do_not_fit(hearth, context):
    with pytest.raises(InputError, match="does not fit"):
        forecast_schemes(hearth, load_device("phone"), context=context)


def test_an_unknown_scheme(hearth):
    with pytest.raises(RecipeError, match="W5"):
        forecast_schemes(hearth, load_device("phone"), schemes=["W5A8"])
