"""Runs the command line as a user does: in a process of its own, from the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trilemma(repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`trilemma("list", "metrics")` -> the finished process with its exit code, stdout and stderr."""

    def run(
        *arguments: str | Path, timeout: float = 120, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1", **(env or {})}
        environment.pop("TRILEMMA_DEBUG", None)
        command = [sys.executable, "-m", "trilemma", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd or repository
        )

    return run
