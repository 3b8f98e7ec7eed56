"""Calibrating a cascade: the chosen threshold against brute force, fresh data against the promise, errors."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import LimitError
from trilemma.core.limit import Limit
from trilemma.runtime.cascade_record import CascadeRule
from trilemma.search.cascade import Scores, calibrate_cascade, choose_rule, quality_of

AGREEMENT = [Limit.parse("agreement>=90%")]


def made_up(rng: np.random.Generator, documents: int = 40, each: int = 5, informative: bool = True) -> Scores:
    """Answers of 20 tokens; the surer the small model, the more of them agree (unless it is uninformative)."""
    count = documents * each
    sure = rng.random(count)
    agreeing = rng.binomial(20, 0.4 + 0.6 * sure if informative else np.full(count, 0.7)).astype(np.float64)
    lost = rng.normal(2.0, 1.0, count)
    noise = rng.random(count)
    full = np.full(count, 20.0)
    return Scores(
        np.repeat(np.arange(documents), each), full, 60 + lost, np.full(count, 60.0), full, agreeing,
        {"mean": sure, "p10": noise},
    )  # fmt: skip


def test_figures_are_those_of_the_definition(random_generator):
    scores = made_up(random_generator)
    rule = CascadeRule(signal="mean", threshold=0.7)
    found = quality_of(scores, rule)
    kept = scores.confidences["mean"] >= 0.7
    nats = np.where(kept, scores.small_nll, scores.large_nll).sum() / 20 / len(kept) - 3
    assert found["ppl_increase"].value == pytest.approx(np.exp(nats) - 1)
    agreeing = np.where(kept, scores.agreeing, 20).sum() / (20 * len(kept))
    assert found["top1_agreement"].value == pytest.approx(agreeing)
    assert found["top1_agreement"].conditions["at_random"] < agreeing  # confidence is worth something here
    low, high = found["top1_agreement"].ci95
    assert low < agreeing < high
    alone = quality_of(scores, None)
    assert (alone["ppl_increase"].value, alone["top1_agreement"].value) == (0, 1)


def test_the_rule_takes_the_signal_that_tells_more(random_generator):
    rule = choose_rule(made_up(random_generator), AGREEMENT)
    assert rule is not None
    assert rule.signal == "mean"
    assert 0.2 < rule.threshold < 0.95
    poor = choose_rule(made_up(random_generator, informative=False), AGREEMENT)
    assert poor is None or poor.threshold > 0.5  # about a third may be kept whatever the signal


def test_easy_and_impossible_limits(random_generator):
    scores = made_up(random_generator)
    easy = choose_rule(scores, [Limit.parse("agreement>=30%")])
    assert easy is not None
    assert easy.threshold == 0  # everything is kept, also answers less sure than any seen
    assert choose_rule(scores, [Limit.parse("agreement>=99.99%")]) is None
    assert choose_rule(scores, [*AGREEMENT, Limit.parse("ppl_increase<=0.001%")]) is None


def test_the_promise_holds_on_fresh_documents():
    """Of repeated calibrations few may end beyond the limit, and most confirmations PASS."""
    rng = np.random.default_rng(7)
    beyond = passed = 0
    for _ in range(12):
        rule = choose_rule(made_up(rng), AGREEMENT)
        assert rule is not None
        fresh = quality_of(made_up(rng, documents=400), rule, ["top1_agreement"])["top1_agreement"]
        beyond += fresh.value < 0.9
        confirm = quality_of(made_up(rng), rule, ["top1_agreement"])["top1_agreement"]
        passed += confirm.ci95[0] >= 0.9
    assert beyond <= 1
    assert passed >= 7


@pytest.mark.parametrize(("limits", "match"), [([], "needs a quality limit"), (["tpot<=20ms"], "can not steer")])
def test_other_limits_are_refused(hearth_path, texts_path, limits, match):
    with pytest.raises(LimitError, match=match):
        calibrate_cascade(hearth_path, hearth_path, data=[texts_path], limits=limits)
