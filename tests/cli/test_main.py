"""Errors become one line on stderr and an exit code; tracebacks only where they were asked for."""

from __future__ import annotations

import errno

import pytest
import typer

from trilemma.cli import main as cli
from trilemma.core.errors import CheckpointError, StoppedError


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (CheckpointError("no shard 2"), 2, "error: no shard 2"),
        (StoppedError("stopped; run it again"), 130, "stopped; run it again"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/model"), 2, "no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, "Permission denied while writing /out"),
        (MemoryError(), 2, "out of memory"),
        (KeyError("x"), 1, "This is a bug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Exit(4), 4, ""),
    ],
)
def test_what_a_failure_says_and_how_it_ends(monkeypatch, capsys, raised, code, said):
    def fail(kind=None, json=False):
        raise raised

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(fail)
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr("sys.argv", ["trilemma"])
    monkeypatch.delenv("TRILEMMA_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert ended.value.code == code
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_debug_shows_the_traceback(monkeypatch, capsys):
    def fail():
        raise ValueError("deep")

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(fail)
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr("sys.argv", ["trilemma"])
    monkeypatch.setenv("TRILEMMA_DEBUG", "1")
    with pytest.raises(SystemExit):
        cli.main()
    assert "Traceback" in capsys.readouterr().err
