"""The least-energy model under a latency and a quality limit, on a tiny model; what estimates may and may not do."""

from __future__ import annotations

import pytest

from made_up_trials import measured
from made_up_trials import trial as made_up
from trilemma.core.errors import InputError, LimitError
from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.measure.energy.per_token import Work, estimate_energy
from trilemma.report import render
from trilemma.search.check import check
from trilemma.search.decide import choose, objective_for, promise
from trilemma.search.judge import relative, verdict
from trilemma.search.run import optimize
from trilemma.search.sentence import ship

ENERGY = "energy_j_per_output_token"


def estimated(seconds, read_bytes, macs, device="laptop"):
    return estimate_energy(
        seconds=seconds, tokens=Work(10, 5), cores=2, read_bytes=read_bytes, macs=macs, device=device
    )[ENERGY]


def test_a_ratio_of_estimates_is_bounded_by_the_ratios_of_their_terms():
    old, new = estimated(1.0, 1e9, 1e9), estimated(0.5, 3e8, 1e9)
    ratio, (low, high) = relative(new, old)
    assert ratio == pytest.approx(new.value / old.value)
    assert (low, high) == (pytest.approx(0.3), pytest.approx(1.0))
    assert low <= ratio <= high


def test_estimates_of_different_machines_are_not_compared_so():
    old, new = estimated(1.0, 1e9, 1e9, "server"), estimated(0.5, 3e8, 1e9)
    assert relative(new, old)[1][1] > 2  # the two wide intervals divided


def test_an_estimate_of_both_passes_no_relative_limit_unasked():
    limit = Limit.parse("energy<=90%")
    old, new = estimated(1.0, 1e9, 1e9), estimated(0.5, 3e8, 1e8)
    assert verdict(limit, new, old).outcome == "INCONCLUSIVE"
    assert verdict(limit, new, old, accept_estimates=True).outcome == "PASS"


def with_energy(trial, joules, source):
    found = measured(ENERGY, joules, joules / 2, source=source)
    return trial.model_copy(update={"measurements": {**trial.measurements, ENERGY: found}})


BASE = with_energy(made_up("baseline", weights=14e6, tpot=2e-3, kl=1e-5, ppl=0.0, status="baseline"), 0.1, "estimated")
FAST = with_energy(made_up("fast", weights=4e6, tpot=1.0e-3, kl=2e-2, ppl=0.005), 0.06, "estimated")
THRIFTY = with_energy(made_up("thrifty", weights=5e6, tpot=1.2e-3, kl=1e-2, ppl=0.005), 0.04, "estimated")
BAD = with_energy(made_up("bad", weights=3e6, tpot=0.9e-3, kl=2.0, ppl=0.5), 0.02, "estimated")
SLOW = with_energy(made_up("slow", weights=3e6, tpot=3e-3, kl=1e-2, ppl=0.005), 0.01, "estimated")
LIMITS = [Limit.parse("tpot<=1.8ms"), Limit.parse("ppl_increase<=2%")]


def test_the_least_energy_within_the_limits_is_chosen():
    objective = objective_for(LIMITS, "energy")
    assert objective.metric == ENERGY
    choice = choose([BASE, FAST, THRIFTY, BAD, SLOW], LIMITS, objective, BASE)
    assert (choice.status, choice.trial.name) == ("feasible", "thrifty")


def test_the_sentence_says_that_the_objective_was_estimated():
    objective = objective_for(LIMITS, "energy")
    verdicts = choose([BASE, THRIFTY], LIMITS, objective, BASE).verdicts
    said = ship(THRIFTY, BASE, verdicts, objective)
    assert "this objective was estimated" in said
    assert "least energy_j_per_output_token" in said
    assert "40.0%" in said
    counted = with_energy(THRIFTY, 0.04, "measured")
    assert "estimated" not in ship(counted, BASE, verdicts, objective)


def test_an_estimate_promises_its_value():
    assert promise(THRIFTY, ENERGY, BASE) == pytest.approx(0.4)


@pytest.fixture(scope="module")
def searched(tiny_checkpoint, tiny_text, tmp_path_factory):
    output = tmp_path_factory.mktemp("energy") / "out"
    return optimize(
        tiny_checkpoint.path, limits=["ppl_increase<=30%", "weights<=90%"], data=tiny_text, output=output,
        time="15s", minimize="energy", threads=1, device="phone", duty_cycle="5%", render=render,
    )  # fmt: skip


def test_every_trial_of_a_search_has_its_energy_and_its_build_cost(searched):
    tried = [trial for trial in searched.report.trials if trial.status == "measured"]
    assert tried
    for trial in [searched.report.baseline, *tried]:
        energy = trial.measurements[ENERGY]
        assert energy.source in ("measured", "estimated")
        assert energy.value > 0
        assert trial.measurements["battery_h"].conditions["device"] == "phone"
    for trial in tried:
        assert trial.measurements["build_s"].value > 0
        assert trial.measurements["build_energy_j"].value > 0
    assert searched.report.objective == f"least {ENERGY}"


def test_the_report_shows_energy_and_payback(searched):
    if searched.output is None:
        pytest.skip("the machine was too busy to confirm within the time")
    report = searched.report
    assert {(p.what, p.resource) for p in report.payback} == {
        ("build", "energy"), ("build", "time"), ("search", "energy"), ("search", "time"),
    }  # fmt: skip
    page = (searched.output / "report.html").read_text()
    for words in ("Energy per token", "When it pays", "Build energy", "Battery"):
        assert words in page
    if report.confirmed.measurements[ENERGY].source == "estimated":
        assert "this objective was estimated" in report.decision.sentence


def test_a_battery_limit_is_checked_again_for_the_same_device(tiny_checkpoint, tiny_text, tmp_path):
    result = optimize(
        tiny_checkpoint.path, limits=["battery>=5h"], data=tiny_text, output=tmp_path / "out", time="15s", threads=1,
        device="laptop", duty_cycle="5%", accept_estimates=True,
    )  # fmt: skip
    if result.output is None:
        pytest.skip("the machine was too busy to confirm within the time")
    (again,) = check(result.output).verdicts
    assert again.measurement.conditions["device"] == "laptop"
    assert again.measurement.value == pytest.approx(result.verdicts[0].measurement.value)
    assert check(result.output, accept_estimates=False).exit_code == 4


def test_battery_can_be_limited_only_with_a_device(tiny_checkpoint, tiny_text):
    with pytest.raises(LimitError, match="without --device"):
        optimize(tiny_checkpoint.path, limits=["battery>=5h"], data=tiny_text, time="5s")
    with pytest.raises(InputError, match="--device"):
        optimize(tiny_checkpoint.path, data=tiny_text, time="5s", duty_cycle="5%")


def test_a_measured_value_needs_no_excuse():
    found = Measurement.of(ENERGY, 1.0)
    assert relative(found, found) == (1.0, (1.0, 1.0))
