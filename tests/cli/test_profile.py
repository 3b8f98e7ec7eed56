"""`trilemma profile`: what it writes can be read again and predicts; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from made_up_host import host
from trilemma.cli.main import app
from trilemma.core.device import load_device, read_device, write_device
from trilemma.core.errors import InputError, OutputError
from trilemma.core.host_tables import CheckCase

SHAPE = str(Path(__file__).parent.parent.parent / "examples/shapes/SmolLM2-135M")
CHECKS = tuple(
    CheckCase(name="8 x 512", quantity=quantity, predicted_s=1.04e-3, measured_s=1e-3)
    for quantity in ("tpot_s", "ttft_s")
)


@pytest.fixture
def measured(monkeypatch):
    asked = {}

    def profile_host(**settings):
        asked.update(settings)
        settings["progress"](1.0, 1.0, "done")
        return host(checks=CHECKS, noisy="other work took 30% of the cores")

    monkeypatch.setattr("trilemma.measure.device.host_profile.profile_host", profile_host)
    return asked


def test_a_profile_is_written_and_predicts(tmp_path, measured):
    path = tmp_path / "here.yaml"
    done = CliRunner().invoke(app, ["profile", "-o", str(path), "--threads", "1", "--quick"], catch_exceptions=False)
    assert done.exit_code == 0
    assert measured["threads"] == [1]
    assert measured["effort"].quick
    assert "noisy: other work took 30%" in done.stdout
    assert "median error 4%" in done.stdout
    assert load_device(path) == host(checks=CHECKS, noisy="other work took 30% of the cores")
    seen = CliRunner().invoke(
        app, ["inspect", SHAPE, "--device", str(path), "--scheme", "bf16,W4A8-g32"], catch_exceptions=False
    )
    assert "median error 4%" in seen.stdout
    assert "noisy machine" in seen.stdout
    assert "Decode" in seen.stdout
    assert "bound by" in seen.stdout


def test_json(tmp_path, measured):
    done = CliRunner().invoke(app, ["profile", "-o", str(tmp_path / "a.yaml"), "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["host"]["cpu"] == "made up"


def test_what_is_there_is_not_replaced(tmp_path, measured):
    path = tmp_path / "here.yaml"
    path.write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        CliRunner().invoke(app, ["profile", "-o", str(path)], catch_exceptions=False)
    assert path.read_text() == "mine"
    assert CliRunner().invoke(app, ["profile", "-o", str(path), "--force"], catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize("threads", ["0", "many", "100000"])
def test_threads_that_are_not_there(tmp_path, measured, threads):
    with pytest.raises(InputError, match="--threads takes numbers"):
        CliRunner().invoke(app, ["profile", "-o", str(tmp_path / "a"), "--threads", threads], catch_exceptions=False)


def test_a_folder_that_is_not_there(tmp_path, measured):
    with pytest.raises(OutputError, match="does not exist"):
        CliRunner().invoke(app, ["profile", "-o", str(tmp_path / "no/a.yaml")], catch_exceptions=False)


def test_checking_again_keeps_the_tables(tmp_path, monkeypatch):
    path = tmp_path / "here.yaml"
    path.write_text(write_device(host()))
    monkeypatch.setattr("trilemma.measure.device.check_cases.check", lambda device, progress: CHECKS)
    done = CliRunner().invoke(app, ["profile", "--check", str(path)], catch_exceptions=False)
    assert done.exit_code == 0
    found = load_device(path)
    assert found.host is not None
    assert found.host.checks == CHECKS
    assert found.host.products == host().host.products
    assert found.decode_factor.value == pytest.approx(1.04)


def test_a_profile_survives_the_file():
    device = host(checks=CHECKS)
    assert read_device(write_device(device)) == device
