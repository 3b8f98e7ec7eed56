"""Recompute or cache on other devices: by hand on a device whose numbers are round."""

from __future__ import annotations

import pytest

from trilemma.core.device import load_device
from trilemma.model.cost import decode_bytes_per_token, kv_bytes_per_token, macs_per_token, prompt_macs, weights_bytes
from trilemma.search.kv_outlook import kv_outlook


def made_up(**values):
    """A device of round numbers: bandwidth in bytes/s, rate in MACs/s at every precision."""
    device = load_device("raspberry-pi-5")
    figure = device.overhead_s

    def number(value):
        return figure.model_copy(update={"value": value})

    return device.model_copy(
        update={
            "bandwidth_bytes_per_s": number(values["bandwidth"]), "bandwidth_share": number(1.0),
            "macs_per_s": {p: number(values["rate"]) for p in ("f32", "bf16", "int8")},
            "overhead_s": number(1e-15), "usable_bytes": number(values.get("usable", 1e12)),
        }
    )  # fmt: skip


def test_times_are_bytes_or_products(tiny_model):
    model = tiny_model()
    config = model.config
    found = kv_outlook(model, made_up(bandwidth=1e30, rate=1e6), depth=40)
    assert found.step_s["none"] == pytest.approx(prompt_macs(model.config, 40) / 1e6, rel=0.03)
    assert found.step_s["bf16"] == pytest.approx(macs_per_token(config, 40) / 1e6, rel=0.03)
    starved = kv_outlook(model, made_up(bandwidth=1e6, rate=1e30), depth=40)
    read = decode_bytes_per_token(config, model.format_of, "int8", 40)
    assert starved.step_s["int8"] == pytest.approx(read / 1e6, rel=0.03)
    assert starved.step_s["none"] == pytest.approx(weights_bytes(config, model.format_of) / 1e6, rel=0.03)


def test_short_of_compute_caches_and_short_of_bandwidth_recomputes(tiny_model):
    model = tiny_model()
    slow_arithmetic = kv_outlook(model, made_up(bandwidth=1e12, rate=1e6))
    assert slow_arithmetic.cheaper_from["bf16"] == 2
    assert slow_arithmetic.macs_per_byte == pytest.approx(1e-6)
    slow_memory = kv_outlook(model, made_up(bandwidth=1e6, rate=1e30))
    assert slow_memory.cheaper_from["bf16"] is None
    assert slow_memory.macs_per_byte > slow_memory.break_even_macs_per_byte["bf16"]
    assert "never faster than recompute" in slow_memory.sentence()


def test_the_first_depth_is_where_the_order_changes(tiny_model):
    model = tiny_model()
    device = made_up(bandwidth=1e9, rate=4e9)
    start = kv_outlook(model, device).cheaper_from["bf16"]
    assert start is not None
    assert 2 < start < 64
    before, after = (kv_outlook(model, device, depth=depth).step_s for depth in (start - 1, start))
    assert before["none"] <= before["bf16"]
    assert after["bf16"] < after["none"]


def test_short_of_memory(tiny_model):
    model = tiny_model()
    weights = weights_bytes(model.config, model.format_of)
    each = kv_bytes_per_token(model.config, "bf16")
    found = kv_outlook(model, made_up(bandwidth=1e9, rate=1e9, usable=weights + 10 * each + 1))
    assert found.longest["bf16"] == 10
    assert found.longest["none"] == 64
    assert 10 < found.longest["int8"] < 64
    assert kv_outlook(model, made_up(bandwidth=1e9, rate=1e9, usable=weights / 2)).longest["none"] == 0
    assert "(estimated)" in found.sentence()
