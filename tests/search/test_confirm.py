"""The confirm run: more text and more repetitions until settled, at few looks, with intervals that allow for them."""

from types import SimpleNamespace

import numpy as np
import pytest

from made_up_trials import BASELINE, INT4_G32, measured
from trilemma.core.limit import Limit
from trilemma.search.confirm import TEXT_MARGINS, TIME_LOOKS, TIME_MARGIN, confirm_trial
from trilemma.search.deadline import Deadline
from trilemma.search.judge import judge_trial, verdict
from trilemma.search.workbench import MOST_REPETITIONS


class Bench:
    """Text narrows the interval of ppl_increase about 1.8% by its square root; times spread evenly about 10 ms."""

    def __init__(self, half=0.004, spread=0.2):
        self.half, self.spread = half, spread
        self.model, self.with_energy_sensor = SimpleNamespace(path=None), False
        self.read, self.rounds = [], 0

    def refer(self, part, documents):
        self.read.append(documents)

    def quality(self, engine, part):
        documents = self.read[-1] if self.read else 10
        return {"ppl_increase": measured("ppl_increase", 0.018, self.half * (10 / documents) ** 0.5, n=documents)}

    def cost(self, model, engine, *, repetitions, settled):
        asked = []
        for done in range(repetitions, MOST_REPETITIONS + 1):
            times = tuple(0.010 * (1 + self.spread * np.linspace(-1, 1, done)))
            found = {"tpot_s": measured("tpot_s", 0.010, 0.010 * self.spread, samples=times)}
            asked.append(done)
            if settled(found, found):
                break
        self.rounds = asked[-1]
        return found, found


def confirm(bench, *limits, seconds=1e6, texts=(10, 20, 40)):
    chosen = [Limit.parse(limit) for limit in limits]
    model = SimpleNamespace(path=None)
    return confirm_trial(bench, INT4_G32, model, "engine", chosen, BASELINE, Deadline(seconds), texts)


def test_text_grows_only_while_a_limit_on_quality_is_open():
    bench = Bench()  # 1.8% +- 0.4, 0.28, 0.2%, each 1.18 times as wide: never off 2%
    confirm(bench, "ppl_increase<=2%")
    assert bench.read == [10, 20, 40]
    settled = Bench(half=0.0025)  # off 2% with twice the text: 0.25 / sqrt 2 * 1.18 = 0.209; four times: 0.148
    trial = confirm(settled, "ppl_increase<=2%")
    assert settled.read == [10, 20, 40]
    assert judge_trial(trial, [Limit.parse("ppl_increase<=2%")], BASELINE)[0].outcome == "PASS"
    far = Bench(half=0.0016)
    confirm(far, "ppl_increase<=2%")
    assert far.read == [10]
    costs_only = Bench()
    confirm(costs_only, "tpot<=20ms")
    assert costs_only.read == [10]


def test_text_does_not_grow_when_time_is_out():
    bench = Bench()
    found = confirm(bench, "ppl_increase<=2%", seconds=1e-9)
    assert bench.read == [10]
    assert found.measurements["ppl_increase"].conditions["looks_margin"] == TEXT_MARGINS[2]


@pytest.mark.parametrize(("texts", "margin"), [((10,), 1.0), ((10, 20), TEXT_MARGINS[1]), ((), 1.0)])
def test_the_margin_is_that_of_the_looks_that_may_come(texts, margin):
    found = confirm(Bench(half=0.0001), "ppl_increase<=2%", texts=texts)
    assert found.measurements["ppl_increase"].conditions.get("looks_margin", 1.0) == margin


def test_times_are_judged_at_few_looks_and_wider():
    open_limit = Bench()
    trial = confirm(open_limit, "tpot<=10.01ms")
    assert open_limit.rounds == TIME_LOOKS[-1] == MOST_REPETITIONS
    assert trial.measurements["tpot_s"].conditions["looks_margin"] == TIME_MARGIN
    sure = Bench()
    confirm(sure, "tpot<=20ms")
    assert sure.rounds == TIME_LOOKS[0]


def test_the_stated_margin_widens_the_verdict():
    limit = Limit.parse("ppl_increase<=2%")
    plain = measured("ppl_increase", 0.018, 0.0018)
    assert verdict(limit, plain).outcome == "PASS"
    looked = plain.model_copy(update={"conditions": {"looks_margin": 1.2, "taken_s": 5.0}})
    found = verdict(limit, looked)
    assert found.outcome == "INCONCLUSIVE"
    # half-width 0.00216 at distance 0.002: n grows from 10 by 1.166 to 12, two documents of half a second
    assert found.settle == "about 2 more documents (it rests on 10 now), about 1 s"


def test_three_margined_looks_err_as_rarely_as_one_look():
    """The factors against an oracle: sums of normal increments, looked at after 1, 2 and 4 parts."""
    rng = np.random.default_rng(0)
    sums = np.cumsum(rng.standard_normal((40_000, 4)), axis=1)[:, [0, 1, 3]] / np.sqrt([1, 2, 4])
    for looks in (2, 3):
        missed = np.mean(np.any(np.abs(sums[:, :looks]) > 1.96 * TEXT_MARGINS[looks - 1], axis=1))
        assert 0.044 <= missed <= 0.054
