"""Ceilings beside the rates: products counted by kind, weighted as a mixture, stated where they belong."""

from __future__ import annotations

import pytest

from trilemma.core.errors import UnsupportedModelError
from trilemma.core.measurement import Measurement
from trilemma.measure.device.ceilings import Bandwidth
from trilemma.measure.timing import roofline
from trilemma.measure.timing.roofline import (
    ATTENTION,
    Ceilings,
    prompt_products,
    step_products,
    step_share,
    weighted_ceiling,
    with_shares,
)
from trilemma.model.cost import kv_bytes, macs_per_token, prompt_macs
from trilemma.model.model import LinearRun


def test_products_of_a_prompt_add_up(tiny_model, random_model, experts_config):
    for model in (tiny_model(tied=True), tiny_model(tied=False)):
        for tokens in (1, 7, 30):
            assert sum(prompt_products(model, tokens).values()) == prompt_macs(model.config, tokens)
    experts = random_model(experts_config(), 0)  # 2 of 5, where the sizes do not divide
    assert sum(prompt_products(experts, 9).values()) == pytest.approx(prompt_macs(experts.config, 9), rel=1e-3)


def test_products_by_hand(tiny_model):
    model = tiny_model(layers=2, dim=48, heads=4, kv_heads=2, head_dim=16, ffn=80, vocab=97)
    downs = ["layers.0.ffn.down.weight", "layers.1.ffn.down.weight"]
    model.linears.update(dict.fromkeys(downs, LinearRun(activation="bf16")))
    assert [name for name in model.config.linear_names() if "down" in name] == downs
    found = prompt_products(model, 5)
    assert found["f32", "bf16"] == (5 + 1) * 48 * 80  # the last layer computes one token through
    keys, others = 2 * 48 * 32, 48 * 64 + 64 * 48 + 2 * 48 * 80
    rest = 5 * (keys + others) + 5 * keys + others + 97 * 48
    attention = (5 * 3 + 5) * 2 * 4 * 16  # a token sees three of five positions in the mean, the last one all
    assert found[ATTENTION] == rest + attention


def test_a_mixture_is_as_fast_as_its_parts_one_after_the_other():
    macs = {("int4-g32", "int8-g32"): 900, ("bf16", "f32"): 100}
    rates = {("int4-g32", "int8-g32"): 300.0, ("bf16", "f32"): 50.0}
    found = weighted_ceiling(macs, rates.__getitem__)
    assert found.macs_per_s == pytest.approx(1000 / (3 + 2))
    assert found.share(10.0) == pytest.approx(0.5)


def rate(macs_per_s):
    return type("Rate", (), {"macs_per_s": macs_per_s})


def measured(prompt_tokens):
    def of(metric, value):
        return Measurement.of(metric, value, conditions={"prompt_tokens": prompt_tokens})

    return {
        "tpot_s": of("tpot_s", 0.01), "decode_tokens_per_s": of("decode_tokens_per_s", 100.0),
        "ttft_s": of("ttft_s", 0.5), "prefill_tokens_per_s": of("prefill_tokens_per_s", prompt_tokens / 0.5),
        "itl_s": of("itl_s", 0.01),
    }  # fmt: skip


def test_shares_stand_in_the_conditions(tiny_model, monkeypatch):
    probed = []
    monkeypatch.setattr(
        roofline, "read_bandwidth", lambda threads, size: probed.append(size) or Bandwidth(1e9, "sum", size, threads)
    )
    monkeypatch.setattr(roofline, "compute_rate", lambda *product: rate(4e6))
    model, ceilings = tiny_model(), Ceilings()
    found = with_shares(measured(8), model, "bf16", 10, 2, ceilings)
    read = found["tpot_s"].conditions["decode_bytes_per_token"]
    assert read == roofline.decode_bytes(model, "bf16", 10)
    assert found["decode_tokens_per_s"].conditions["roofline_share"] == pytest.approx(read * 100 / 1e9)
    assert found["ttft_s"].conditions["compute_share"] == pytest.approx(prompt_macs(model.config, 8) / 0.5 / 4e6)
    assert found["prefill_tokens_per_s"].conditions["compute_share"] == found["ttft_s"].conditions["compute_share"]
    assert "compute_share" not in found["tpot_s"].conditions
    assert "roofline_share" not in found["itl_s"].conditions
    with_shares(measured(8), model, "bf16", 11, 2, ceilings)
    assert probed == [read]  # a working set of nearly that size was probed already
    assert len(ceilings.notes()) == 2


def test_a_product_without_a_kernel_leaves_the_share_out(tiny_model, monkeypatch):
    def refuse(*product):
        raise UnsupportedModelError("no kernel")

    monkeypatch.setattr(roofline, "compute_rate", refuse)
    monkeypatch.setattr(roofline, "read_bandwidth", lambda threads, size: Bandwidth(1e9, "sum", size, threads))
    found = with_shares(measured(8), tiny_model(), "bf16", 10, 1, Ceilings())
    assert "compute_share" not in found["ttft_s"].conditions
    assert "roofline_share" in found["tpot_s"].conditions


def test_a_ceiling_that_is_exceeded_is_probed_again_and_the_best_counts(tiny_model, monkeypatch):
    model = tiny_model()
    reached = prompt_macs(model.config, 8) / 0.5
    rates, reads = iter([reached / 2, 2 * reached, reached]), iter([1.0, 5e5, 2.0, 9e9])
    monkeypatch.setattr(roofline, "compute_rate", lambda *product: rate(next(rates)))
    monkeypatch.setattr(roofline, "read_bandwidth", lambda threads, size: Bandwidth(next(reads), "sum", size, threads))
    found = with_shares(measured(8), model, "bf16", 10, 1, Ceilings())
    assert found["ttft_s"].conditions["compute_share"] == pytest.approx(0.5)
    assert found["tpot_s"].conditions["read_bandwidth_bytes_per_s"] == 5e5  # two more probes, then it stays above 100%
    assert found["tpot_s"].conditions["roofline_share"] > 1


def test_a_step_is_held_against_the_nearer_ceiling(tiny_model, monkeypatch):
    model = tiny_model()
    assert sum(step_products(model, 3, 20).values()) == 3 * macs_per_token(model.config, 20)
    read = roofline.decode_bytes(model, "bf16", 20) + 2 * kv_bytes(model.config, "bf16", 20)
    macs = 3 * macs_per_token(model.config, 20)
    monkeypatch.setattr(roofline, "read_bandwidth", lambda threads, size: Bandwidth(1e9, "sum", size, threads))
    for rate_, bound, limit_s in ((1e12, "memory", read / 1e9), (1e3, "arithmetic", macs / 1e3)):
        monkeypatch.setattr(roofline, "compute_rate", lambda *product, rate_=rate_: rate(rate_))
        found = step_share(model, "bf16", 3, 20, 1, 2 * limit_s, Ceilings())
        assert found["bound_by"] == bound
        assert found["roofline_share"] == pytest.approx(0.5)
    assert step_share(model, "none", 3, 20, 1, 1.0, Ceilings()) == {}
