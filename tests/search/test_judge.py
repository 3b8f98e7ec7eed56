"""Verdicts: where the interval lies decides; estimates and unknowns never pass."""

import math

import numpy as np
import pytest

from made_up_trials import measured
from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.search.judge import binding, outcome_of, relative, slack, verdict


@pytest.mark.parametrize(
    ("text", "value", "half", "outcome"),
    [
        ("ppl_increase<=2%", 0.01, 0.005, "PASS"),
        ("ppl_increase<=2%", 0.03, 0.005, "FAIL"),
        ("ppl_increase<=2%", 0.018, 0.005, "INCONCLUSIVE"),
        ("tpot<=20ms", 0.015, 0.001, "PASS"),
        ("decode>=30", 40.0, 2.0, "PASS"),
        ("decode>=30", 31.0, 2.0, "INCONCLUSIVE"),
        ("decode>=30", 20.0, 2.0, "FAIL"),
        ("top1_agreement>=95%", 0.97, 0.01, "PASS"),
    ],
)
def test_outcome_follows_the_interval(text, value, half, outcome):
    limit = Limit.parse(text)
    found = verdict(limit, measured(limit.metric, value, half))
    assert found.outcome == outcome
    assert (found.settle is not None) == (outcome == "INCONCLUSIVE")


def test_touching_the_limit_is_inside():
    assert verdict(Limit.parse("ppl_increase<=2%"), measured("ppl_increase", 0.01, 0.01)).outcome == "PASS"


def test_bytes_are_exact():
    base = measured("weights_bytes", 100.0)
    assert verdict(Limit.parse("weights<=50%"), measured("weights_bytes", 50.0), base).outcome == "PASS"
    assert verdict(Limit.parse("weights<=50%"), measured("weights_bytes", 50.1), base).outcome == "FAIL"
    assert verdict(Limit.parse("weights<=50B"), measured("weights_bytes", 51.0)).outcome == "FAIL"


def test_settle_estimates_the_documents():
    # half-width 0.005 at distance 0.002: n grows by (5/2)^2 = 6.25, from 16 to 100
    found = verdict(Limit.parse("ppl_increase<=2%"), measured("ppl_increase", 0.018, 0.005, n=16))
    assert "84 more documents" in found.settle
    on_the_line = verdict(Limit.parse("ppl_increase<=2%"), measured("ppl_increase", 0.02, 0.005, n=16))
    assert "hardly settle" in on_the_line.settle


def test_estimates_do_not_pass_unless_accepted():
    limit = Limit.parse("energy<=1J")
    guess = measured("energy_j_per_output_token", 0.1, 0.05, source="estimated")
    assert verdict(limit, guess).outcome == "INCONCLUSIVE"
    assert "--accept-estimates" in verdict(limit, guess).settle
    assert verdict(limit, guess, accept_estimates=True).outcome == "PASS"
    hopeless = measured("energy_j_per_output_token", 10, 0.05, source="estimated")
    assert verdict(limit, hopeless).outcome == "FAIL"


def test_unavailable_is_inconclusive_with_its_reason():
    found = verdict(Limit.parse("energy<=1J"), Measurement.unavailable("energy", "no counter on this host"))
    assert found.outcome == "INCONCLUSIVE"
    assert "no counter on this host" in found.reason


def test_relative_without_a_baseline():
    found = verdict(Limit.parse("tpot<=90%"), measured("tpot_s", 1e-3, 1e-5), None)
    assert found.outcome == "INCONCLUSIVE"
    assert "absolute" in found.reason


def test_pairing_removes_common_drift():
    rng = np.random.default_rng(3)
    drift = np.linspace(1, 2, 12)
    base = drift * np.exp(rng.normal(0, 0.01, 12))
    ours = 0.8 * drift * np.exp(rng.normal(0, 0.01, 12))
    a = measured("tpot_s", float(np.median(ours)), 0.2, samples=tuple(ours))
    b = measured("tpot_s", float(np.median(base)), 0.2, samples=tuple(base))
    ratio, (low, high) = relative(a, b)
    assert low < 0.8 < high
    assert high - low < 0.03
    assert ratio == pytest.approx(0.8, abs=0.02)
    found = verdict(Limit.parse("tpot<=90%"), a, b)
    assert found.outcome == "PASS"
    assert found.relative_ci95 == (low, high)
    unpaired = verdict(Limit.parse("tpot<=90%"), a.model_copy(update={"samples": ()}), b)
    assert unpaired.outcome == "INCONCLUSIVE"


def test_paired_interval_covers_the_truth():
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(400):
        ours, base = np.exp(rng.normal(math.log(0.9), 0.05, 6)), np.exp(rng.normal(0, 0.05, 6))
        low, high = relative(
            measured("tpot_s", 1.0, samples=tuple(ours)), measured("tpot_s", 1.0, samples=tuple(base))
        )[1]
        inside += low <= 0.9 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_margin_widens():
    m = measured("ppl_increase", 0.01, 0.006)
    limit = Limit.parse("ppl_increase<=2%")
    assert verdict(limit, m).outcome == "PASS"
    assert verdict(limit, m, margin=2.0).outcome == "INCONCLUSIVE"


def test_binding_is_the_least_slack_and_the_worst_outcome_wins():
    base = measured("weights_bytes", 100.0)
    loose = verdict(Limit.parse("weights<=50%"), measured("weights_bytes", 10.0), base)
    tight = verdict(Limit.parse("ppl_increase<=2%"), measured("ppl_increase", 0.018, 0.0001))
    assert binding([loose, tight]) is tight
    assert slack(loose) == pytest.approx(0.8)
    failed = verdict(Limit.parse("ppl_increase<=1%"), measured("ppl_increase", 0.018, 0.0001))
    assert outcome_of([loose, tight]) == "PASS"
    assert outcome_of([loose, tight, failed]) == "FAIL"
