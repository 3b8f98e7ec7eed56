"""An option that the chosen view would pass over in silence is refused, before anything is opened."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from trilemma.cli.main import app
from trilemma.cli.options import refuse_unused, split_names
from trilemma.core.environment import command_line
from trilemma.core.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "m", "--context", "64"], "--context has no meaning without --device"),
        (["inspect", "m", "--diagnose", "--scheme", "W8A8"], "--scheme has no meaning without --device"),
        (["inspect", "m", "--diagnose", "--duty-cycle", "5%"], "--duty-cycle has no meaning without --device"),
        (["inspect", "m", "--complaint", "slow"], "--complaint has no meaning without --diagnose"),
        (["inspect", "m", "--diagnose", "--plot", "a.svg"], "--plot has no meaning without --waterfall"),
        (["inspect", "m", "--device", "phone", "--prompt", "9"], "--prompt has no meaning without --diagnose or"),
        (["inspect", "m", "--device", "phone", "--diagnose"], "--device and --diagnose are different questions"),
        (["compare", "m", "m", "--plot", "a.svg"], "give text with --data"),
        (["compare", "m", "--ladder", "--kv", "int8"], "Leave --kv, --isa and --runtime out"),
    ],
)
def test_refused(arguments, says):
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InputError)
    assert done.exception.exit_code == 2
    assert says in str(done.exception)


def test_what_belongs_together_passes():
    refuse_unused({"--a": True, "--b": False}, {("--a",): {"--x": 1}, ("--b",): {"--y": None, "--z": []}})
    assert split_names(["a, b", "c,,"]) == ["a", "b", "c"]
    assert split_names(None) == []


def test_the_command_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/trilemma", "run", "--limit", "agreement>=95%"])
    assert command_line() == "trilemma run --limit 'agreement>=95%'"
    monkeypatch.setattr(sys, "argv", ["/src/trilemma/__main__.py", "list"])
    assert command_line() == "trilemma list"
    monkeypatch.setattr(sys, "argv", ["/bin/pytest", "tests"])
    assert command_line() == ""
