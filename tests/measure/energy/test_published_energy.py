"""The estimate's constants against what others measured: reproducible fit, held-out machines inside the intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from trilemma.measure.energy.energy_model import DEVICES, read_classes, work_energy_j
from trilemma.measure.energy.published import PublishedEnergy, fit, read_published

PUBLISHED = read_published()
HELD_OUT = [case for case in PUBLISHED.cases if case.use == "check"]


def test_the_formula_by_hand():
    found = work_energy_j(
        power_w=10.0, seconds=0.5, byte_pj=100.0, read_bytes=2e9, mac_pj={"f32": 4.0, "int8": 0.5},
        macs={"f32": 1e9, "int8": 2e10},
    )  # fmt: skip
    assert found == pytest.approx(5.0 + 0.2 + 0.004 + 0.01)


@pytest.mark.parametrize("case", HELD_OUT, ids=lambda case: f"{case.machine}-{case.model}")
def test_every_held_out_case_lies_inside_the_stated_interval(case):
    constants = DEVICES[case.device_class]
    assert 1 / constants.factor <= case.estimate(constants) / case.j_per_token <= constants.factor


def test_the_held_out_cases_are_of_machines_that_nothing_was_fitted_on():
    assert not PUBLISHED.machines("fit") & PUBLISHED.machines("check")
    assert len(PUBLISHED.machines("check")) >= 10
    assert {case.device_class for case in HELD_OUT} == set(DEVICES)
    assert {case.source for case in PUBLISHED.cases} == set(PUBLISHED.sources)


def test_the_shipped_constants_are_those_of_the_fit():
    fitted = fit(PUBLISHED, DEVICES)
    assert set(fitted) == {"board", "laptop"}
    for name, found in fitted.items():
        assert DEVICES[name].core_w == pytest.approx(found.core_w, rel=0.01)
        assert found.factor <= DEVICES[name].factor <= found.factor + 0.11  # rounded up, never down


def test_what_nothing_was_fitted_on_has_wider_intervals():
    fitted = {name: DEVICES[name].factor for name in fit(PUBLISHED, DEVICES)}
    assert all(DEVICES[name].factor > max(fitted.values()) for name in set(DEVICES) - set(fitted))


def test_every_constant_says_where_it_is_from():
    file = read_classes()
    for one in file.classes.values():
        for figure in (one.base_w, one.core_w, one.byte_pj, one.factor):
            assert figure.claim
            assert figure.basis == "assumed" or figure.source in file.sources


def made_up(machine, core_w, use="fit", kind="board"):
    """A case that the formula meets exactly with that core_w, four cores and the class's other constants."""
    constants = DEVICES[kind].model_copy(update={"core_w": core_w})
    work = {"cores": 4, "read_bytes": 1e9, "macs": 1e9}
    watts = constants.joules(seconds=0.5, cores=4, read_bytes=1e9, macs=1e9, precision="int8") / 0.5
    return {
        "class": kind, "machine": machine, "use": use, "model": "m", "source": "s", "tokens_per_s": 2.0, "watts": watts,
        "scope": "wall", "claim": "made up", **work,
    }  # fmt: skip


def published(cases):
    source = {"title": "t", "url": "u", "read": "2026-01-01"}
    return PublishedEnergy.model_validate({"version": 1, "sources": {"s": source}, "cases": cases, "set_aside": []})


def test_the_fit_finds_a_known_constant_and_spread():
    exact = fit(published([made_up("a", 3.0), made_up("b", 3.0)]), DEVICES)["board"]
    assert exact.core_w == pytest.approx(3.0)
    assert exact.factor == pytest.approx(1.0)
    cases = [made_up("a", 3.0), made_up("b", 3.0), made_up("c", 3.0)]
    for case, scale in zip(cases, (math.exp(0.2), math.exp(-0.2), 1.0), strict=True):
        case["watts"] *= scale
    found = fit(published(cases), DEVICES)["board"]
    assert found.core_w == pytest.approx(3.0, rel=1e-6)
    assert found.factor == pytest.approx(math.exp(4.3027 * 0.2 * math.sqrt(4 / 3)), rel=1e-3)  # t of 2 degrees


def test_a_machine_with_many_models_counts_once():
    one = fit(published([made_up("a", 2.0), made_up("b", 4.0)]), DEVICES)["board"]
    many = fit(published([made_up("a", 2.0)] * 5 + [made_up("b", 4.0)]), DEVICES)["board"]
    assert (many.core_w, many.factor, many.machines) == (pytest.approx(one.core_w), pytest.approx(one.factor), 2)


def test_the_prediction_interval_covers_new_machines():
    """Machines drawn around a truth: a further one lies inside 95% of the time, whatever the few drawn showed."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        cases = [made_up(f"m{index}", 3.0) for index in range(4)]
        for case, off in zip(cases, rng.normal(0, 0.3, 4), strict=True):
            case["watts"] *= math.exp(off)
        fitted = fit(published(cases), DEVICES)["board"]
        constants = DEVICES["board"].model_copy(update={"core_w": fitted.core_w})
        seen = published([made_up("new", 3.0, "check")]).cases[0]
        ratio = seen.estimate(constants) / (seen.j_per_token * math.exp(rng.normal(0, 0.3)))
        inside += 1 / fitted.factor <= ratio <= fitted.factor
    assert 0.92 <= inside / 400 <= 0.98


def test_a_machine_on_both_sides_or_without_a_source_is_refused():
    with pytest.raises(ValidationError, match="fitted on and checked with: a"):
        published([made_up("a", 3.0), made_up("a", 3.0, "check")])
    with pytest.raises(ValidationError, match="no source is called"):
        published([{**made_up("a", 3.0), "source": "elsewhere"}])
