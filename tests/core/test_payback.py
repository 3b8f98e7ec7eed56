"""After how many tokens building is repaid: by hand, and what never is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilemma.core.measurement import Measurement
from trilemma.core.payback import payback, payback_tokens, tokens_text
from trilemma.search.payback import paybacks


def test_by_hand():
    assert payback_tokens(1000, 0.5, 0.25) == pytest.approx(4000)
    assert payback_tokens(0, 0.5, 0.25) == 0


@pytest.mark.parametrize("after", [0.5, 0.75, 0.5 - 1e-320])
def test_no_saving_is_never_repaid(after):
    assert payback_tokens(1000, 0.5, after) is None
    assert "never repaid" in payback("energy", 1000, 0.5, after).text


def test_costs_are_not_negative():
    with pytest.raises(ValueError, match="negative"):
        payback_tokens(-1, 0.5, 0.25)


@given(st.floats(0, 1e9), st.floats(1e-6, 1e3), st.floats(0, 1e3))
def test_after_so_many_tokens_both_have_cost_the_same(spent, before, after):
    tokens = payback_tokens(spent, before, after)
    if tokens is None:
        assert after >= before or spent / (before - after) == float("inf")
    else:
        assert spent + tokens * after == pytest.approx(tokens * before, rel=1e-6, abs=1e-6)


def test_words():
    assert payback("energy", 3100, 0.02, 0.008, source="estimated").text == (
        "the build took 3,100 J of energy (estimated); saving 12.0 mJ a token repays it after 258,000 output tokens"
    )
    assert payback("time", 90, 3e-3, 1e-3, what="search").text == (
        "the search took 1 min 30 s of time; saving 2.00 ms a token repays it after 45,000 output tokens"
    )
    assert payback("time", 0.25, 1e-3, 2e-3).text == (
        "the build took 250 ms of time, which is never repaid: a token costs 1.00 ms more"
    )
    assert payback("energy", 5, 1, 1).text.endswith("a token saves nothing")
    assert [tokens_text(x) for x in (0.4, 7, 1234, 99_999, 1.234e6)] == [
        "0 output tokens", "7 output tokens", "1,230 output tokens", "100,000 output tokens",
        "1.23 million output tokens",
    ]  # fmt: skip


def test_from_measurements():
    def of(metric, value, source="measured"):
        return {metric: Measurement.of(metric, value, source=source)}

    spent = of("build_s", 10) | of("build_energy_j", 100, "estimated")
    before = of("tpot_s", 0.003) | of("energy_j_per_output_token", 0.2)
    after = of("tpot_s", 0.002) | of("energy_j_per_output_token", 0.3)
    energy, time = paybacks(spent, before, after)
    assert (energy.resource, energy.tokens, energy.source) == ("energy", None, "estimated")
    assert (time.resource, time.source) == ("time", "measured")
    assert time.tokens == pytest.approx(10_000)
    assert paybacks(of("build_s", 10), before, {}) == ()
