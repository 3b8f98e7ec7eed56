"""Device profiles: every number says where it is from; a broken file is answered with the key."""

from __future__ import annotations

import datetime
from importlib.resources import files

import pytest
import yaml

from trilemma.core.device import DEVICES, Device, load_device, read_device
from trilemma.core.duty import DutyCycle, battery_hours
from trilemma.core.errors import InputError, UnknownNameError


def shipped(name):
    return yaml.safe_load((files("trilemma") / "devices" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", DEVICES)
def test_every_number_of_a_shipped_profile_has_a_source(name):
    device = load_device(name)
    assert device.name == name
    given = shipped(name)
    for key, figure in device.figures().items():
        place = given
        for part in key.split("."):
            place = place[part]
        assert isinstance(place, dict), f"{key} is a bare number"
        assert len(figure.claim) > 15, key
        if figure.basis != "assumed":
            source = device.sources[figure.source]
            assert source.url.startswith("https://"), key
            assert source.read >= datetime.date(2026, 11, 1)
    assert {figure.source for figure in device.figures().values() if figure.source} == set(device.sources)
    assert sum(figure.basis == "assumed" for figure in device.figures().values()) <= len(device.figures()) // 2


def changed(**changes):
    return yaml.safe_dump({**shipped("laptop"), **changes}, default_flow_style=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"idle_w": {"value": -1, "basis": "assumed", "claim": "x"}}, "idle_w.value"),
        ({"idle_w": {"value": 5, "basis": "published", "claim": "x"}}, "names its source"),
        ({"idle_w": {"value": 5, "basis": "published", "source": "nowhere", "claim": "x"}}, "nowhere"),
        ({"idle_w": 400}, "active_w is less than idle_w"),
        ({"usable_bytes": 1e12}, "usable_bytes is more"),
        ({"bandwidth_share": 1.5}, "between 0 and 1"),
        ({"decode_factor": 0.5}, "1 or more"),
        ({"macs_per_s": {"f32": 1e9}}, "bf16, int8"),
        ({"speed": 3}, "speed"),
        ({"version": 7}, "version 7"),
    ],
)
def test_a_malformed_profile_names_the_key(changes, says):
    with pytest.raises(InputError, match=says):
        read_device(changed(**changes))


@pytest.mark.parametrize("text", ["", "- 1\n- 2", "name: [", "just words"])
def test_what_is_no_profile_at_all(text):
    with pytest.raises(InputError, match="device profile"):
        read_device(text)


def test_a_users_file_may_give_bare_numbers(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(changed(idle_w=2.5, name="mine"))
    device = load_device(path)
    assert device.idle_w.value == 2.5
    assert device.idle_w.basis == "assumed"
    assert read_device(device.model_dump_json()) == device  # JSON is YAML


def test_an_unknown_device_is_answered_with_the_valid_ones():
    with pytest.raises(UnknownNameError, match="laptop, phone, raspberry-pi-5"):
        load_device("raspberry")
    with pytest.raises(InputError, match="No such file"):
        load_device("nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "tokens_per_h", "share"),
    [("200 tokens/h", 200, None), ("4800 tokens/day", 200, None), ("2 tok/s", 7200, None), ("5%", None, 0.05),
     ("1e3 tokens/h", 1000, None)],
)  # fmt: skip
def test_duty_cycles(text, tokens_per_h, share):
    found = DutyCycle.parse(text)
    assert found.tokens_per_h == (None if tokens_per_h is None else pytest.approx(tokens_per_h))
    assert found.share == share


@pytest.mark.parametrize("text", ["", "0%", "101%", "-5%", "often", "200", "0 tokens/h", "1.2.3%", "5 tokens/week"])
def test_no_duty_cycle(text):
    with pytest.raises(InputError, match="200 tokens/h"):
        DutyCycle.parse(text)


def test_battery_hours_by_hand():
    assert battery_hours(battery_wh=20, idle_w=0.5, busy_w=4.5, busy_share=0.25) == pytest.approx(20 / 1.5)
    assert DutyCycle.parse("900 tokens/h").busy_share(2.0) == pytest.approx(0.5)
    with pytest.raises(InputError, match="fewer tokens"):
        battery_hours(battery_wh=20, idle_w=0.5, busy_w=4.5, busy_share=1.2)


def test_the_record_refuses_unknown_versions():
    assert Device.model_fields["version"].default == 2


def test_a_profile_of_version_1_is_read_as_it_was():
    old = {**shipped("laptop"), "version": 1}
    found = read_device(yaml.safe_dump(old))
    assert found.version == 2
    assert found.host is None
    assert found == load_device("laptop")


def test_a_measured_number_needs_no_page():
    found = read_device(changed(idle_w={"value": 4.0, "basis": "measured", "claim": "rapl-package over 2 s"}))
    assert found.idle_w.basis == "measured"
