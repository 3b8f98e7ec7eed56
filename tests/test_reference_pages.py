"""docs/reference says what the program says: written pages are current, and every metric has a page by hand."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def writer(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """docs/make_reference.py as a module."""
    monkeypatch.syspath_prepend(str(repository / "docs"))
    yield importlib.import_module("make_reference")
    sys.modules.pop("make_reference")


@pytest.fixture
def copied(writer: ModuleType, tmp_path: Path) -> Path:
    """The pages of metrics in a folder of their own, to be spoiled."""
    return Path(shutil.copytree(writer.REFERENCE / "metrics", tmp_path / "metrics"))


def test_the_reference_is_current(repository):
    script = repository / "docs" / "make_reference.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, cwd=repository)
    assert done.returncode == 0, done.stderr


def test_every_metric_has_its_page_with_every_section(writer):
    assert writer.metric_faults(writer.REFERENCE / "metrics") == []
    assert writer.unmeasured() == []


def test_a_page_that_is_missing_or_left_over_is_found(writer, copied):
    (copied / "tpot_s.md").rename(copied / "old_name_s.md")
    assert writer.metric_faults(copied) == ["old_name_s.md belongs to no metric", "tpot_s.md is missing"]


def test_a_section_that_is_missing_empty_or_unknown_is_found(writer, copied):
    page = copied / "kl_mean.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("## Method", "## Methods"), encoding="utf-8")
    assert writer.metric_faults(copied) == [
        "kl_mean.md says nothing under 'Method'", "kl_mean.md has another section 'Methods'",
    ]  # fmt: skip
    page.write_text(text[: text.index("## Source")] + "## Source\n\n", encoding="utf-8")
    assert writer.metric_faults(copied) == ["kl_mean.md says nothing under 'Source'"]


def test_an_old_head_is_found_and_written_anew_without_touching_the_body(writer, copied):
    page = copied / "power_w.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("| unit | W |", "| unit | mW |") + "\nAnd this.\n", encoding="utf-8")
    assert writer.metric_faults(copied) == ["power_w.md has an old head; run `make docs`"]
    assert writer.metric_pages(copied)[page] == text + "\nAnd this.\n"
    page.write_text(text.replace(writer.HEAD_END, ""), encoding="utf-8")  # the mark was lost
    assert writer.metric_pages(copied)[page] == text


def test_a_new_metric_gets_a_page_to_be_filled_in(writer, copied):
    (copied / "itl_s.md").unlink()
    made = writer.metric_pages(copied)[copied / "itl_s.md"]
    assert re.findall("^#+ (.+)$", made, re.MULTILINE) == ["`itl_s`", *writer.SECTIONS]
    (copied / "itl_s.md").write_text(made, encoding="utf-8")
    assert len(writer.metric_faults(copied)) == len(writer.SECTIONS)


def test_links_of_the_reference_lead_somewhere(repository):
    for page in sorted((repository / "docs" / "reference").rglob("*.md")):
        if page.name not in ("commands.md", "python.md"):  # these quote the program
            for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
                assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_are_those_that_the_program_registers(repository):
    from trilemma.cli.main import app

    text = (repository / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## trilemma ?(.*)$", text, re.MULTILINE)
    groups = [group.name for group in app.registered_groups]
    assert {title.split(" ")[0] for title in titles} - {""} == {c.name for c in app.registered_commands} | {*groups}
