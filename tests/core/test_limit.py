"""Limits: what is read, in which unit, and how a wrong one is explained."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilemma.core.errors import LimitError
from trilemma.core.limit import Limit
from trilemma.core.metric import METRICS


@pytest.mark.parametrize(
    ("text", "metric", "op", "value", "relative"),
    [
        ("weights<=50%", "weights_bytes", "<=", 0.5, True),
        ("tpot<=20ms", "tpot_s", "<=", 0.020, False),
        ("tpot <= 90 %", "tpot_s", "<=", 0.9, True),
        ("peak_memory<=400MB", "peak_memory_bytes", "<=", 400e6, False),
        ("memory<=1GiB", "engine_memory_bytes", "<=", 2.0**30, False),
        ("decode>=30", "decode_tokens_per_s", ">=", 30, False),
        ("ppl_increase<=2%", "ppl_increase", "<=", 0.02, False),
        ("agreement>=95%", "top1_agreement", ">=", 0.95, False),
        ("kl<=1e-3", "kl_mean", "<=", 0.001, False),
        ("energy<=500mJ", "energy_j_per_output_token", "<=", 0.5, False),
        ("accuracy/piqa>=60%", "accuracy/piqa", ">=", 0.6, False),
        ("battery>=90min", "battery_h", ">=", 1.5, False),
        ("p99_itl_ms<=50", "itl_p99_s", "<=", 0.050, False),
        ("median_ttft_ms<=0.2s", "ttft_s", "<=", 0.2, False),
        ("pp512>=100", "prefill_tokens_per_s", ">=", 100, False),
        ("tg128>=90%", "decode_tokens_per_s", ">=", 0.9, True),
    ],
)
def test_reads_metric_unit_and_reference(text, metric, op, value, relative):
    limit = Limit.parse(text)
    assert (limit.metric, limit.op, limit.relative) == (metric, op, relative)
    assert limit.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weights", "METRIC<=NUMBER"),
        ("wieghts<=50%", "weights"),  # the close name is offered
        ("tpot<=20MB", "Valid units"),
        ("tpot>=20ms", "tpot<=20ms"),  # the right direction is offered
        ("decode<=30", "decode>=30"),
        ("tpot<=1.2.3ms", "not a number"),
        ("tpot<=1e999s", "finite"),
        ("", "METRIC<=NUMBER"),
    ],
)
def test_a_wrong_limit_says_what_is_wrong(text, said):
    with pytest.raises(LimitError, match="limit") as caught:
        Limit.parse(text)
    assert said in str(caught.value)


@given(metric=st.sampled_from(sorted(METRICS)), number=st.floats(1e-6, 1e12), percent=st.booleans())
def test_every_metric_takes_a_number_and_a_per_cent(metric, number, percent):
    op = "<=" if METRICS[metric].direction == "lower" else ">="
    limit = Limit.parse(f"{metric}{op}{number!r}{'%' if percent else ''}")
    assert limit.metric == metric
    assert limit.value == pytest.approx(number / 100 if percent else number)
    assert limit.relative == (percent and METRICS[metric].unit != "ratio")


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_in_our_own_words(text):
    with contextlib.suppress(LimitError):
        assert Limit.parse(text).text == text


def test_a_relative_limit_needs_the_baseline():
    limit = Limit.parse("tpot<=90%")
    assert limit.threshold(0.010) == pytest.approx(0.009)
    with pytest.raises(LimitError, match="absolute"):
        limit.threshold(None)
    assert Limit.parse("tpot<=9ms").threshold(None) == pytest.approx(0.009)
