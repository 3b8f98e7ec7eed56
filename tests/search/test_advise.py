"""advise: arithmetic by hand, queues by simulation, thresholds that really turn the ranking, the worked scenarios."""

from __future__ import annotations

import heapq
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from trilemma.core.device import load_device
from trilemma.core.errors import InputError
from trilemma.search.strategies import costs
from trilemma.search.strategies.advise import advise, assess_all, winner
from trilemma.search.strategies.scenario import (
    BatchStep,
    Network,
    Remote,
    Scenario,
    Serving,
    Workload,
    numbers,
    read_scenario,
)
from trilemma.search.strategies.sensitivity import readable, with_number

SCENARIOS = Path(__file__).resolve().parents[2] / "examples" / "scenarios"
WINNERS = {
    "voice-assistant-phone": "1B in 4 bits on the phone",
    "banking-chatbot": "small model on our servers",
    "smart-home": "360M in 8 bits",
    "cpu-server": "provider",
    "two-equal-models": "Llama 1B, which our runtime loads",
}


def workload(**changes):
    given = {"requests_per_day": 1000, "peak_requests_per_s": 1, "prompt_tokens": 100, "output_tokens": 11}
    return Workload.model_validate({**given, **changes})


def scenario(**changes):
    """Two remote candidates: a dear good one and a cheap worse one."""
    remote = {"ttft_s": 0.2, "tpot_s": 0.01, "price_input_per_million": 1, "price_output_per_million": 4}
    cheap = {**remote, "price_input_per_million": 0.1, "price_output_per_million": 0.4}
    given = {
        "name": "test",
        "workload": {"requests_per_day": 1000, "peak_requests_per_s": 1, "prompt_tokens": 1000, "output_tokens": 500},
        "prices": {"engineer_per_day": 500},
        "candidates": [
            {"name": "good", "place": "remote", "remote": remote, "quality": 0.9, "setup_days": 2},
            {"name": "cheap", "place": "remote", "remote": cheap, "quality": 0.7, "setup_days": 3},
        ],
    }
    return Scenario.model_validate({**given, **changes})


def test_prices_by_hand():
    remote = Remote(ttft_s=1, tpot_s=1, price_input_per_million=2, price_output_per_million=10)
    assert costs.remote_price(remote, workload(), 1000) == pytest.approx(0.2 + 0.11)
    network = Network(bytes_per_token=10, price_per_gb=3, round_trip_s=0.1, bytes_per_s=2000)
    assert costs.traffic_price(network, workload(), 1e6) == pytest.approx(111 * 10 * 1e6 / 1e9 * 3)
    assert costs.network_s(network, workload()) == pytest.approx(0.1 + 0.5)
    assert costs.battery_share(36.0, 10.0, 100) == pytest.approx(0.1)
    found = {item.name: item for item in assess_all(scenario())}
    # 1,000 requests a day: (1000 x 1 + 500 x 4) / 1e6 each, and two days of work over twelve months
    assert found["good"].cost_per_month["tokens"] == pytest.approx(30.44 * 1000 * 0.003)
    assert found["good"].cost_per_month["work"] == pytest.approx(500 * 2 / 12)
    assert found["good"].answer_s == pytest.approx(0.2 + 0.008 + 499 * 0.01)  # 8 kB on the way at 1 MB/s


def test_a_forecast_on_a_device_is_the_roofline_by_hand(shapes_path):
    given = scenario(
        devices=[{"profile": "raspberry-pi-5"}],
        candidates=[{"name": "m", "place": "device", "model": str(shapes_path / "SmolLM2-135M"), "scheme": "W8A8-g32"}],
    )
    place = costs.on_device(given.candidates[0], given.devices[0], given.workload)
    device = costs.changed_device(given.devices[0])
    step = place.times.tpot_s - device.overhead_s.value
    read = step * device.bandwidth_bytes_per_s.value * device.bandwidth_share.value
    assert 134.5e6 * 8.5 / 8 < read < 1.25 * 134.5e6 * 8.5 / 8  # 8.5 bits a weight, and the cache
    twice = costs.on_device(given.candidates[0], given.devices[0].model_copy(update={"speed": 2.0}), given.workload)
    assert twice.times.tpot_s == pytest.approx(place.times.tpot_s / 2)


def test_erlang_c_against_the_sum_in_the_textbook(random_generator):
    for _ in range(20):
        slots = int(random_generator.integers(1, 30))
        load = float(random_generator.uniform(0.05, 0.98) * slots)
        terms = [load**k / math.factorial(k) for k in range(slots)]
        last = load**slots / math.factorial(slots) / (1 - load / slots)
        assert costs.erlang_c(slots, load) == pytest.approx(last / (sum(terms) + last), rel=1e-9)


def test_the_wait_for_a_slot_against_a_simulated_queue():
    generator = np.random.default_rng(7)
    slots, hold, rate, count = 4, 1.0, 3.2, 200_000
    arrivals = np.cumsum(generator.exponential(1 / rate, count))
    holds = generator.exponential(hold, count)
    free = [0.0] * slots
    waits = np.empty(count)
    for index in range(count):
        first = heapq.heappop(free)
        start = max(first, arrivals[index])
        waits[index] = start - arrivals[index]
        heapq.heappush(free, start + holds[index])
    assert costs.wait_s(slots, rate * hold, hold) == pytest.approx(np.quantile(waits, 0.95), rel=0.1)


def test_fleets_keep_the_limits_with_no_server_too_many():
    serving = Serving(
        prefill_tokens_per_s=1000, steps=(BatchStep(batch=1, step_s=0.02), BatchStep(batch=8, step_s=0.05))
    )
    work = workload(ttft_limit_s=0.5, tpot_limit_s=0.08, peak_requests_per_s=20)
    fleet = costs.least_fleet(serving, work, 20.0, Network())
    assert fleet is not None
    assert fleet.ttft_s <= 0.5
    assert fleet.tpot_s <= 0.08
    for step in serving.steps:
        fewer = costs.fleet_of(serving, work, 20.0, fleet.servers - 1, step.batch, step.step_s)
        assert fewer is None or costs.broken_times(costs.Times(fewer.ttft_s, fewer.tpot_s), work)
    # prefill takes rate x prompt / prefill rate of the servers' time, which decoding then lacks
    share = 20.0 / fleet.servers * 0.1
    step_s = next(step.step_s for step in serving.steps if step.batch == fleet.batch)
    assert fleet.tpot_s == pytest.approx(step_s / (1 - share))
    assert costs.least_fleet(serving, workload(tpot_limit_s=0.01), 1.0, Network()) is None


def test_the_worst_device_decides_and_can_be_left_out(shapes_path):
    slow = {"profile": "phone", "name": "slow phone", "share": 0.1, "changes": {"macs_per_s": {
        "int8": "1e9", "bf16": "1e9", "f32": "1e9"}}}  # fmt: skip
    given = scenario(
        workload={"requests_per_day": 10, "peak_requests_per_s": 1, "prompt_tokens": 100, "output_tokens": 10,
                  "ttft_limit_s": 2},
        devices=[{"profile": "phone", "share": 0.9}, slow],
        candidates=[{"name": "m", "place": "device", "model": str(shapes_path / "SmolLM2-135M"), "scheme": "W8A8-g32"}],
    )  # fmt: skip
    (item,) = assess_all(given)
    assert not item.feasible
    assert item.decided_by == "slow phone"
    assert "slow phone" in item.failures[0].text
    (item,) = assess_all(given.model_copy(update={"least_share_served": 0.9}))
    assert item.feasible
    assert item.decided_by == "phone"
    assert "slow phone" in item.notes[0]


@pytest.mark.parametrize(
    ("changes", "constraint"),
    [
        ({"data_may_go": "own servers"}, "data"),
        ({"workload": {"offline": True}}, "offline"),
        ({"workload": {"least_quality": 0.95}}, "quality"),
        ({"workload": {"ttft_limit_s": 0.1}}, "ttft_limit_s"),
        ({"workload": {"answer_limit_s": 1}}, "answer_limit_s"),
        ({"workload": {"least_available": 0.99}, "network": {"available": 0.9}}, "available"),
        ({"prices": {"most_per_month": 1, "engineer_per_day": 500}}, "budget"),
    ],
)
def test_every_hard_constraint_names_itself(changes, constraint):
    base = {"requests_per_day": 1000, "peak_requests_per_s": 1, "prompt_tokens": 1000, "output_tokens": 500}
    if "workload" in changes:
        changes = {**changes, "workload": {**base, **changes["workload"]}}
    found = advise(scenario(**changes), sensitivity=False)
    assert found.winner is None
    assert all(constraint in {failure.constraint for failure in item.failures} for item in found.strategies)


def test_ranking_by_preference_and_by_the_next_criterion_among_equals():
    assert winner(scenario()) == "cheap"
    assert winner(scenario(prefer="quality")) == "good"
    assert winner(scenario(prefer="effort")) == "good"
    found = advise(scenario(prefer="quality", equal_within=0.225), sensitivity=False)
    assert found.winner == "cheap"
    assert found.reasons["cheap"].startswith("before good: quality being equal, cost")
    assert found.reasons["good"] == "feasible, and behind all the others"


def test_a_cascade_pays_for_what_it_hands_on_and_waits_for_the_small_answer():
    given = scenario(
        cascades=[{"name": "both", "small": "cheap", "large": "good", "kept_share": 0.75, "quality": 0.85}]
    )
    found = {item.name: item for item in assess_all(given)}
    both, small, large = found["both"], found["cheap"], found["good"]
    expected = small.cost_per_month["tokens"] + 0.25 * large.cost_per_month["tokens"]
    assert both.cost_per_month["tokens"] == pytest.approx(expected)
    assert both.ttft_s == pytest.approx(small.answer_s + large.ttft_s)
    assert both.setup_days == pytest.approx(small.setup_days + large.setup_days)
    assert both.kind == "cascade"


def path_of(data, words):
    for path, _ in numbers(data):
        if path.split(".")[0] not in ("basis", "devices", "version") and readable(data, path) == words:
            return path
    raise AssertionError(words)


@pytest.mark.parametrize("name", ["voice-assistant-phone", "cpu-server", "two-equal-models"])
def test_thresholds_turn_the_ranking(name):
    given = read_scenario(SCENARIOS / f"{name}.yaml")
    found, data = advise(given), given.model_dump()
    moved = [swap for swap in found.swaps if swap.direction != "as"]
    assert moved
    for swap in moved[:6]:
        path = path_of(data, swap.input)
        whole = path.endswith("_tokens")
        step = 1 if whole else 1e-4 * swap.threshold
        away = 1 if swap.direction == "above" else -1
        beyond = swap.threshold if whole else swap.threshold + away * step
        assert winner(with_number(data, path, swap.threshold - away * step)) == found.winner, swap
        assert winner(with_number(data, path, beyond)) == swap.becomes, swap


@pytest.mark.parametrize("name", WINNERS)
def test_worked_scenarios(name):
    path = SCENARIOS / f"{name}.yaml"
    found = advise(path, sensitivity=False)
    assert found.winner == WINNERS[name]
    assert set(found.reasons) == set(found.ranking)
    for item in found.strategies:
        assert item.feasible == (item.name in found.ranking)
        assert all(failure.text and failure.constraint for failure in item.failures)
        assert item.quality is None or item.quality_source
    # every number states where it is from
    data = yaml.safe_load(path.read_text())
    for where, _ in numbers(data):
        key = where.split(".")[0]
        assert key == "version" or data["basis"].get(key, "").startswith(("assumption:", "source:")), where


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workloads": {}}, "workloads"),
        ({"version": 2}, "version 2"),
        ({"least_share_served": 1.5}, "least_share_served"),
        ({"candidates": []}, "candidates"),
        ({"devices": [{"profile": "phone", "share": 0.7}, {"profile": "laptop", "share": 0.7}]}, "1.4"),
        ({"cascades": [{"name": "x", "small": "nobody", "large": "good", "kept_share": 0.5}]}, "nobody"),
    ],
)
def test_files_that_can_not_be_used_are_named(tmp_path, change, message):
    data = {**scenario().model_dump(mode="json"), **change}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match=message):
        read_scenario(tmp_path / "s.yaml")


def test_a_device_must_exist_and_its_changes_be_keys(tmp_path, shapes_path):
    candidate = {"name": "m", "place": "device", "model": str(shapes_path / "SmolLM2-135M")}
    with pytest.raises(InputError, match="raspberry-pi-5"):
        advise(scenario(devices=[{"profile": "pi"}], candidates=[candidate]))
    with pytest.raises(InputError, match="speed_of_light"):
        advise(scenario(devices=[{"profile": "phone", "changes": {"speed_of_light": 3e8}}], candidates=[candidate]))


def test_a_profile_that_was_edited_is_read_anew(tmp_path, shapes_path):
    profile = tmp_path / "mine.yaml"
    text = load_device("phone").model_dump(mode="json")
    candidate = {"name": "m", "place": "device", "model": str(shapes_path / "SmolLM2-135M")}
    given = scenario(devices=[{"profile": str(profile)}], candidates=[candidate])
    answers = []
    for overhead_s in (0.001, 0.1):
        profile.write_text(yaml.safe_dump({**text, "overhead_s": overhead_s}))
        answers.append(advise(given, sensitivity=False).strategies[0].tpot_s)
    assert answers[1] - answers[0] == pytest.approx(0.099)


def test_every_field_has_help():
    from pydantic import BaseModel

    from trilemma.search.strategies import scenario as advise_scenario

    for record in vars(advise_scenario).values():
        if isinstance(record, type) and issubclass(record, BaseModel) and record.__module__ == advise_scenario.__name__:
            for name, field in record.model_fields.items():
                assert field.description, f"{record.__name__}.{name}"
