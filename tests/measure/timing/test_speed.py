"""Timing: interleaving, warm-up, medians, pairing and refusals, on an engine with made-up times."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import EngineError, InputError
from trilemma.measure.timing.speed import SPEED_METRICS, SpeedRun, measure_speed, relative


def stamps(ttft, gap, count):
    return [ttft + gap * index for index in range(count)]


def test_medians_rates_and_samples(fake_engine):
    gaps = [9.0, 0.010, 0.012, 0.011, 0.030, 0.013]  # the first call is the warm-up and must not count
    engine = fake_engine(times=lambda call: stamps(0.2 + call, gaps[call], 5))
    found = measure_speed({"a": engine}, prompt_tokens=8, output_tokens=5)["a"]
    assert tuple(found) == SPEED_METRICS
    assert found["tpot_s"].value == pytest.approx(0.012)
    assert found["tpot_s"].samples == pytest.approx(tuple(gaps[1:]))
    assert found["ttft_s"].samples == pytest.approx((1.2, 2.2, 3.2, 4.2, 5.2))
    assert found["decode_tokens_per_s"].value == pytest.approx(1 / 0.012)
    assert found["prefill_tokens_per_s"].value == pytest.approx(8 / 3.2)
    assert found["itl_s"].n == 20
    assert found["itl_s"].conditions["p99_itl_ms".replace("_ms", "_s")] == pytest.approx(0.030, rel=0.1)
    low, high = found["tpot_s"].ci95
    assert low < 0.012 < high
    assert found["tpot_s"].conditions["prompt_tokens"] == 8
    assert found["tpot_s"].n == 5


def test_candidates_are_interleaved_on_one_prompt(fake_engine):
    order = []
    engines = {}
    for name in "abc":
        engines[name] = fake_engine(times=lambda call, name=name: order.append(name) or stamps(0.1, 0.01, 4))
    measure_speed(engines, prompt_tokens=6, output_tokens=4, repetitions=4, seed=9)
    assert order[:3] == ["a", "b", "c"]
    rounds = [order[at : at + 3] for at in range(3, len(order), 3)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    prompts = {tuple(prompt) for engine in engines.values() for prompt, _ in engine.calls}
    assert len(prompts) == 1
    settings = engines["a"].calls[0][1]
    assert settings.ignore_eos
    assert settings.max_tokens == 4


def test_ratios_are_paired(fake_engine):
    drift = lambda call: 1 + 0.3 * call  # noqa: E731
    engines = {
        "a": fake_engine(times=lambda call: stamps(0.1, 0.010 * drift(call), 4)),
        "b": fake_engine(times=lambda call: stamps(0.1, 0.008 * drift(call), 4)),
    }
    found = measure_speed(engines, prompt_tokens=2, output_tokens=4, repetitions=7)
    ratio = relative(found["a"]["tpot_s"], found["b"]["tpot_s"])
    assert ratio == pytest.approx((0.8, 0.8, 0.8))
    with pytest.raises(InputError, match="can not be paired"):
        relative(found["a"]["tpot_s"], found["b"]["ttft_s"])


def test_a_run_can_be_continued(fake_engine):
    run = SpeedRun({"a": fake_engine()}, prompt_tokens=2, output_tokens=3)
    run.warm_up()
    run.repeat(3)
    before = run.results()["a"]["tpot_s"]
    run.repeat(4)
    after = run.results()["a"]["tpot_s"]
    run.close()
    assert (before.n, after.n) == (3, 7)
    assert after.samples[:3] == before.samples


def test_the_time_limit_leaves_three_repetitions(fake_engine):
    engine = fake_engine()
    seen = []
    found = measure_speed(
        {"a": engine}, prompt_tokens=2, output_tokens=3, repetitions=50, time_limit_s=0.0,
        progress=lambda done, total, what: seen.append((done, total)),
    )  # fmt: skip
    assert found["a"]["tpot_s"].n == 3
    assert seen == [(1, 50), (2, 50), (3, 50)]


def test_lengths_and_engines_that_stop_early_are_refused(fake_engine):
    with pytest.raises(InputError, match="do not fit the context of 'a'"):
        measure_speed({"a": fake_engine(context=10)}, prompt_tokens=8, output_tokens=4)
    with pytest.raises(InputError, match="at least 1 prompt token and 2 output"):
        measure_speed({"a": fake_engine()}, prompt_tokens=8, output_tokens=1)
    short = fake_engine(answers=lambda prompt, settings: [1, 2])
    with pytest.raises(EngineError, match="2 tokens"):
        measure_speed({"a": short}, prompt_tokens=2, output_tokens=5)
    frozen = fake_engine(times=lambda call: [0.1] * 5)
    with pytest.raises(EngineError, match="do not increase"):
        measure_speed({"a": frozen}, prompt_tokens=2, output_tokens=5)


def test_random_prompts_stay_in_the_vocabulary(fake_engine):
    engine = fake_engine(vocab=7)
    measure_speed({"a": engine}, prompt_tokens=40, output_tokens=2, repetitions=1, seed=int(np.random.randint(1 << 30)))
    assert set(engine.calls[0][0]) <= set(range(7))
