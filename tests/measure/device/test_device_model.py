"""The roofline on other devices: arithmetic by hand, what must grow with what, and published cases inside."""

from __future__ import annotations

from importlib.resources import files

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trilemma.core.device import DEVICES, Figure, load_device
from trilemma.core.duty import DutyCycle
from trilemma.measure.device.device_model import Demand, decode_seconds, forecast, joules

PUBLISHED = yaml.safe_load((files("trilemma") / "devices" / "published.yaml").read_text(encoding="utf-8"))
CASES = PUBLISHED["cases"]
PROMPT = {"phone": 64, "raspberry-pi-5": 512}  # as the sources state


def number(case, key):
    return float(case[key])


def simple(**more):
    """A device with round numbers: 10 GB/s, 100 GMAC/s in int8, 1 ms of overhead, 2 W and 10 W, 20 Wh."""
    given = {
        "bandwidth_bytes_per_s": 2e10, "bandwidth_share": 0.5, "overhead_s": 1e-3, "idle_w": 2, "active_w": 10,
        "byte_pj": 100, "battery_wh": 20, "usable_bytes": 4e9, "storage_bytes_per_s": 1e9, "decode_factor": 2,
        "prefill_factor": 4, "energy_factor": 2, "checked_bytes": 1e6, **more,
    }  # fmt: skip
    rates = {"f32": 1e10, "bf16": 2e10, "int8": 1e11}
    energies = {"f32": 4, "bf16": 2, "int8": 1}
    return load_device("laptop").model_copy(
        update={
            **{key: Figure.model_validate(value) for key, value in given.items()},
            "macs_per_s": {key: Figure.model_validate(value) for key, value in rates.items()},
            "mac_pj": {key: Figure.model_validate(value) for key, value in energies.items()},
        }
    )


def demand(**more):
    given = {
        "prompt_tokens": 100, "output_tokens": 11, "weights_bytes": 1e9, "kv_bytes": 1e8, "read_bytes": 1e9,
        "macs": {"int8": 1e9, "f32": 1e7}, "prefill_bytes": 1e9, "prefill_macs": {"int8": 1e11},
    }  # fmt: skip
    return Demand.model_validate({**given, **more})


def test_by_hand():
    found = forecast(simple(), demand(), DutyCycle.parse("10%"))
    values = {name: item.value for name, item in found.measurements.items()}
    assert values["tpot_s"] == pytest.approx(0.1 + 0.001)  # 1 GB at 10 GB/s; 1e9/1e11 + 1e7/1e10 = 11 ms is less
    assert values["ttft_s"] == pytest.approx(1.0 + 0.001)  # 1e11 products at 1e11/s
    request_s = 1.001 + 10 * 0.101
    request_j = 10 * request_s + 1e-12 * (100 * (1e9 + 10 * 1e9) + (1e11 + 10 * 1e9) * 1 + 10 * 1e7 * 4)
    assert values["energy_j_per_output_token"] == pytest.approx(request_j / 11)
    assert values["power_w"] == pytest.approx(request_j / request_s)
    assert values["battery_h"] == pytest.approx(20 / (0.9 * 2 + 0.1 * request_j / request_s))
    assert found.fits
    assert found.bound == "memory"
    assert found.needed_bytes == pytest.approx(1.1e9)
    assert found.load_s == pytest.approx(1.0)
    assert found.measurements["tpot_s"].ci95 == pytest.approx((0.0505, 0.202))
    assert found.measurements["ttft_s"].ci95 == pytest.approx((1.001 / 4, 1.001 * 4))
    assert {item.source for item in found.measurements.values()} == {"estimated"}


def test_what_binds():
    device = simple()
    assert decode_seconds(device, 1e9, {"int8": 1e8})[1] == "memory"
    assert decode_seconds(device, 1e7, {"int8": 1e10})[1] == "compute"
    assert decode_seconds(device, 1e6, {"int8": 1e6})[1] == "overhead"


def test_a_duty_cycle_that_can_not_be_kept_says_how_much_can():
    battery = forecast(simple(), demand(), DutyCycle.parse("1000000 tokens/h")).measurements["battery_h"]
    assert battery.source == "unavailable"
    assert "at most" in battery.reason


def test_no_battery_says_so():
    device = simple().model_copy(update={"battery_wh": None})
    assert "no battery" in forecast(device, demand()).measurements["battery_h"].reason


def test_too_large_does_not_fit():
    assert not forecast(simple(), demand(weights_bytes=3.95e9)).fits


def test_smaller_than_any_published_case_is_less_sure():
    sure = forecast(simple(), demand()).measurements["tpot_s"]
    unsure = forecast(simple(checked_bytes=1e10), demand()).measurements["tpot_s"]
    assert unsure.value == sure.value
    assert unsure.ci95[1] == pytest.approx(2 * sure.ci95[1])


@given(
    read=st.floats(1e6, 1e10), macs=st.floats(1e6, 1e11), prompt=st.integers(1, 4096), more=st.floats(1.0, 50.0),
    which=st.sampled_from(("read_bytes", "macs", "weights_bytes")), name=st.sampled_from(DEVICES),
)  # fmt: skip
def test_more_work_never_costs_less(read, macs, prompt, more, which, name):
    device = load_device(name)
    small = demand(read_bytes=read, prefill_bytes=read, weights_bytes=read, macs={"int8": macs}, prompt_tokens=prompt,
                   prefill_macs={"int8": prompt * macs})  # fmt: skip
    grown = {"macs": {"int8": more * macs}} if which == "macs" else {which: more * read}
    large = small.model_copy(update=grown)
    one, two = (forecast(device, each, DutyCycle.parse("1%")) for each in (small, large))
    for metric in ("tpot_s", "energy_j_per_output_token"):
        assert two.measurements[metric].value >= one.measurements[metric].value * (1 - 1e-12)
    assert two.needed_bytes >= one.needed_bytes
    if device.battery_wh is not None:
        per_token = DutyCycle.parse("1 tokens/day")
        one, two = (forecast(device, each, per_token).measurements["battery_h"].value for each in (small, large))
        assert two <= one * (1 + 1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['device']}-{case['model']}")
def test_published_cases_lie_inside_the_stated_intervals(case):
    device = load_device(case["device"])
    precision = {case["precision"]: number(case, "macs")}
    seconds, _ = decode_seconds(device, number(case, "read_bytes"), precision)
    factor = device.decode_factor.value
    assert 1 / factor <= seconds * number(case, "decode_tokens_per_s") <= factor
    if "prefill_macs" in case:
        tokens = PROMPT[case["device"]]
        work = {case["precision"]: tokens * number(case, "prefill_macs")}
        seconds_of_prompt, _ = decode_seconds(device, number(case, "read_bytes"), work)
        ratio = seconds_of_prompt / tokens * number(case, "prefill_tokens_per_s")
        assert 1 / device.prefill_factor.value <= ratio <= device.prefill_factor.value
    if "j_per_token" in case:
        guess = joules(device, seconds=seconds, read_bytes=number(case, "read_bytes"), macs=precision)
        ratio = guess / number(case, "j_per_token")
        assert 1 / device.energy_factor.value <= ratio <= device.energy_factor.value


def test_some_published_cases_took_no_part_in_fitting():
    for name in DEVICES:
        uses = [case["use"] for case in CASES if case["device"] == name]
        assert uses.count("check") >= 2
        assert uses.count("fit") <= uses.count("check") <= len(uses)
    assert {case["source"] for case in CASES} == set(PUBLISHED["sources"])
