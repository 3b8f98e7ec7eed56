"""The README's commands and code run as they stand there, made cheap: less time, fewer tokens, output elsewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

CHEAP = {"optimize": ["--time", "40s"], "bench": ["--repetitions", "1"], "compare": ["--max-tokens", "4000"]}
OUTCOMES = {"optimize": {0, 3, 4}, "check": {0, 3, 4}}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def readme(repository):
    return (repository / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(repository, tmp_path_factory):
    """A folder where `examples` is there and `out` is ours."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(repository / "examples")
    return folder


def test_commands_run_in_order(readme, place):
    commands = [line for block in blocks(readme, "") for line in block.splitlines() if line.startswith("trilemma ")]
    assert len(commands) >= 9
    for line in commands:
        name, *arguments = shlex.split(line)[1:]
        if name == "optimize":
            arguments = arguments[: arguments.index("--time")]
        command = [sys.executable, "-m", "trilemma", name, *arguments, *CHEAP.get(name, [])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, timeout=200)
        assert done.returncode in OUTCOMES.get(name, {0}), f"{line}\n{done.stdout}\n{done.stderr}"


def test_python_runs(readme, place):
    (code,) = blocks(readme, "python")
    cheap = code.replace('time="1m"', 'time="40s"')
    done = subprocess.run([sys.executable, "-c", cheap], capture_output=True, text=True, cwd=place, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 1


def test_links_lead_somewhere(repository):
    for page in [*repository.glob("*.md"), *repository.glob("docs/**/*.md"), *repository.glob("examples/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"


def test_the_text_names_no_path_of_one_machine(repository):
    for page in [*repository.glob("*.md"), *repository.glob("docs/**/*.md")]:
        assert not re.search(r"(?<![\w.])/(work|home|root)/", page.read_text(encoding="utf-8")), page


def test_make_is_told_where_everything_is(repository):
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "test-full", "lint", "bench", "native", "clean"):
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), target
    assert os.access(repository / ".ci" / "run", os.X_OK)
