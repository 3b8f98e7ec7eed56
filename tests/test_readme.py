"""The README's commands and code run as they stand there, made cheap: less time, fewer tokens, output elsewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from trilemma.model.checkpoint import write_checkpoint

CHEAP = {"optimize": ["--time", "40s"], "bench": ["--repetitions", "1"], "compare": ["--max-tokens", "4000"]}
QUICK = {
    "optimize": {"--time": "15s"},
    "distill": {"--time": "10s"},
    "compare": {"--max-tokens": "3000", "--repetitions": "2"},
    "eval": {"--max-tokens": "3000"},
    "bench": {"--repetitions": "1"},
}
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


@pytest.fixture(scope="module")
def tiny_place(repository, tiny_model, tmp_path_factory):
    """The same folder with a tiny random model where the shipped one lies: its tokenizer, 2 layers of 64."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "out").mkdir()
    for name in ("texts", "shapes", "scenarios"):
        (folder / "examples" / name).parent.mkdir(exist_ok=True)
        (folder / "examples" / name).symlink_to(repository / "examples" / name)
    shipped = repository / "examples" / "models" / "hearth-7m"
    model = tiny_model(dim=64, layers=4, heads=4, kv_heads=4, head_dim=16, ffn=384, vocab=8192, context=512)
    tiny = folder / "examples" / "models" / "hearth-7m"
    write_checkpoint(model, tiny, dtype="bf16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped / name, tiny / name)
    return folder


def questions(text: str) -> list[list[str]]:
    """The commands of each row of the table of questions."""
    table = text.partition("## Questions")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ") and "trilemma" in line]
    return [re.findall(r"`(trilemma [^`]+)`", row) for row in rows]


def test_every_question_has_a_command_that_runs(readme, tiny_place):
    rows = questions(readme)
    assert len(rows) >= 13
    assert all(rows)
    first = "trilemma compress examples/models/hearth-7m -o out/hearth-w8 --scheme W8A8-g32"
    assert first in readme
    for line in [first, *(command for row in rows for command in row)]:
        name, *arguments = shlex.split(line)[1:]
        for option, value in QUICK.get(name, {}).items():
            if option in arguments:
                del arguments[arguments.index(option) : arguments.index(option) + 2]
            arguments += [option, value]
        command = [sys.executable, "-m", "trilemma", name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tiny_place, timeout=200)
        accepted = {0, 3, 4} if "--limit" in arguments else {0}
        assert done.returncode in accepted, f"{line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip(), line


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
