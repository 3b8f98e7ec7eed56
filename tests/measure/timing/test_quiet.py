"""Which rounds are set aside: bursts on one candidate or all, quiet machines left alone, pairing kept."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.measure.timing.interleave import interleave
from trilemma.measure.timing.quiet import by_repetition, level_moved, sift
from trilemma.measure.timing.settle import repeat_until_settled
from trilemma.measure.timing.speed import SpeedRun, measure_speed, relative


def stamps(ttft, gap, count):
    return [ttft + gap * index for index in range(count)]


def test_a_quiet_machine_loses_nothing(random_generator):
    times = random_generator.uniform(1.0, 1.04, (3, 50)) * [[1.0], [20.0], [0.001]]
    about = sift(times)
    assert about.kept.all()
    assert about.share_aside == 0
    assert about.reason is None


def test_rounds_with_a_burst_are_set_aside_for_all_candidates():
    times = np.ones((2, 20))
    times[0, 3] = 1.3  # one candidate, 14% in the mean
    times[:, 7:9] = 1.06
    times[1, 11] = 1.08  # 4% in the mean: not felt by both
    about = sift(times)
    assert np.flatnonzero(~about.kept).tolist() == [3, 7, 8]
    assert about.share_aside == pytest.approx(0.15)
    assert about.reason is None


def test_few_rounds_are_all_kept_and_three_at_least():
    assert sift([[1.0, 9.0, 1.0, 4.0]]).kept.all()
    assert sift([np.geomspace(1, 100, 12)]).kept.sum() == 3


def test_a_run_disturbed_for_long_is_noisy():
    mostly = np.where(np.arange(40) % 5 == 0, 1.0, 1.5)
    assert "80% of the rounds" in sift([mostly]).reason
    assert sift([np.where(np.arange(40) % 3 == 0, 1.0, 1.5)]).reason is None
    steps = np.where(np.arange(40) < 20, 1.0, 1.08)
    assert "moved by +8%" in sift([steps]).reason
    assert level_moved(steps) == pytest.approx(0.08)
    assert level_moved([1.0, 2.0]) == 0


def test_medians_of_repetitions():
    kept = np.array([True, True, False, True, False, False, True])
    assert by_repetition([1, 3, 50, 7, 90, 90, 5], [0, 0, 0, 1, 2, 2, 3], kept) == [2, 7, 5]


def test_what_is_set_aside_stays_in_the_record_and_pairs_stay_pairs(fake_engine):
    slow = {5, 6, 13}  # calls; the first is the warm-up
    engines = {
        name: fake_engine(times=lambda call, own=own: stamps(0.1, own * (1.4 if call in slow else 1 + call / 1000), 3))
        for name, own in (("a", 0.010), ("b", 0.005))
    }
    found = measure_speed(engines, prompt_tokens=4, output_tokens=3, repetitions=20)
    ours, theirs = found["a"]["tpot_s"], found["b"]["tpot_s"]
    assert (ours.n, len(ours.samples), len(ours.set_aside)) == (17, 17, 3)
    assert ours.set_aside == pytest.approx((0.014,) * 3)
    assert ours.conditions["set_aside_share"] == 0.15
    assert found["a"]["ttft_s"].conditions["set_aside_share"] == 0
    assert found["a"]["itl_s"].n == 34
    assert "15% of the rounds set aside" in ours.method
    assert relative(ours, theirs) == pytest.approx((0.5, 0.5, 0.5))
    assert found["b"]["decode_tokens_per_s"].set_aside == pytest.approx((1 / 0.007,) * 3)


def test_short_requests_make_rounds_of_a_repetition(fake_engine):
    engine = fake_engine(times=lambda call: stamps(0.004, 0.002, 4))  # 10 ms
    run = SpeedRun({"a": engine}, prompt_tokens=2, output_tokens=4)
    run.warm_up()
    run.repeat(3)
    found = run.results()["a"]["tpot_s"]
    run.close()
    assert len(engine.calls) == 2 + 3 * 5
    assert (found.n, found.conditions["rounds"]) == (3, 15)


def test_a_run_goes_on_until_it_is_settled_or_out_of_time(fake_engine):
    steady = SpeedRun({"a": fake_engine()}, prompt_tokens=2, output_tokens=3)
    steady.warm_up()
    assert repeat_until_settled([steady], time_limit_s=0.0)
    assert steady.repetitions == 5
    wild = SpeedRun(
        {"a": fake_engine(times=lambda call: stamps(0.1, 0.01 + call * 0.618 % 1 * 4e-4, 3))},
        prompt_tokens=2, output_tokens=3,
    )  # fmt: skip
    wild.warm_up()
    seen = []
    assert not repeat_until_settled([wild], time_limit_s=0.1, target=1e-6, progress=lambda *about: seen.append(about))
    bursts = SpeedRun(
        {"a": fake_engine(times=lambda call: stamps(0.1, 0.02 if call % 3 else 0.01, 3))}, prompt_tokens=2,
        output_tokens=3,
    )  # fmt: skip
    bursts.warm_up()
    assert not repeat_until_settled([bursts], time_limit_s=0.1)
    assert bursts.half_width == 0
    assert bursts.share_aside == pytest.approx(2 / 3, abs=0.05)
    for run in (steady, wild, bursts):
        run.close()
    assert seen[-1] == (1, 1, "speed")
    assert wild.half_width > 1e-6


def test_interleaved_cases_lose_the_same_rounds():
    calls = {"a": 0, "b": 0}

    def case(name, seconds):
        def run():
            calls[name] += 1
            return {"s": seconds * (3.0 if calls[name] == 6 else 1.0)}

        return run

    found = interleave({"a": case("a", 0.1), "b": case("b", 0.2)}, threads=1, rounds=12)
    assert found.of("a", "s").tolist() == [0.1] * 11
    assert found.of("b", "s").tolist() == [0.2] * 11
    assert found.set_aside["a"]["s"] == pytest.approx([0.3])
