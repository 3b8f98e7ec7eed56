"""`inspect --device` and `list devices` on the command line: the table, the JSON, and bad input."""

from __future__ import annotations

import json

import pytest
import yaml


def test_the_table_by_scheme(trilemma, hearth_path):
    done = trilemma("inspect", hearth_path, "--device", "phone", "--scheme", "as it is,W4A8-g32", "--duty-cycle", "5%")
    assert done.returncode == 0, done.stderr
    for words in ("OnePlus 12", "as it is", "W4A8-g32", "fits", "energy per token", "Battery hours at 5%", "estimates"):
        assert words in done.stdout


def test_json_carries_the_profile_and_every_forecast(trilemma, hearth_path):
    done = trilemma("inspect", hearth_path, "--device", "raspberry-pi-5", "--context", "128", "--json")
    document = json.loads(done.stdout)
    there = document["on_device"]
    assert there["device"]["name"] == "raspberry-pi-5"
    assert document["parameters"] > 0
    for forecast in there["forecasts"].values():
        assert forecast["fits"] is True
        assert forecast["measurements"]["tpot_s"]["source"] == "estimated"
        assert forecast["measurements"]["battery_h"]["reason"]


def test_devices_are_listed(trilemma):
    shown = trilemma("list", "devices").stdout
    for name in ("host", "phone", "raspberry-pi-5", "laptop"):
        assert name in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "toaster"], "laptop, phone, raspberry-pi-5"),
        (["--device", "phone", "--duty-cycle", "often"], "200 tokens/h"),
        (["--device", "phone", "--scheme", "W9A9"], "W9A9"),
        (["--device", "phone", "--context", "9999"], "does not fit"),
        (["--duty-cycle", "5%"], "--device"),
        (["--context", "64"], "--device"),
        (["--device", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input(trilemma, hearth_path, arguments, says):
    done = trilemma("inspect", hearth_path, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert not done.stdout


def test_a_malformed_profile_names_the_key(trilemma, hearth_path, tmp_path, repository):
    given = yaml.safe_load((repository / "src" / "trilemma" / "devices" / "laptop.yaml").read_text())
    given["active_w"]["value"] = "a lot"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(given))
    done = trilemma("inspect", hearth_path, "--device", path)
    assert done.returncode == 2
    assert "active_w.value" in done.stderr
    given["active_w"]["value"] = 33
    path.write_text(yaml.safe_dump(given))
    assert trilemma("inspect", hearth_path, "--device", path).returncode == 0


def test_compress_states_what_building_cost(trilemma, hearth_path, tmp_path):
    done = trilemma(
        "compress",
        hearth_path,
        "--scheme",
        "W8A8-g32",
        "-o",
        tmp_path / "small",
        "--payback",
        "--threads",
        "1",
        "--json",
    )
    found = json.loads(done.stdout)
    assert set(found["build"]) == {"build_s", "build_energy_j"}
    assert found["seconds"] == found["build"]["build_s"]["value"] > 0  # the search for bits is part of both
    assert [p["resource"] for p in found["payback"]] == ["energy", "time"]
