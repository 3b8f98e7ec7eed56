"""Writes docs/reference: the help of every command, the metrics, the Python API. A test holds it current.

python docs/make_reference.py            writes the pages
python docs/make_reference.py --check    says what is out of date or missing, exit code 1

The page of a metric has a written head (name, unit, where it is measured) above a body by hand; writing the heads
anew leaves the bodies alone.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path

import trilemma
from trilemma.core.metric import METRICS, SYNONYMS, TASK_METRICS, Metric, resolve_metric
from trilemma.measure import METERS

REFERENCE = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- Written by docs/make_reference.py; change the source, then run `make docs`. -->\n\n"
HEAD_NOTE = "<!-- Down to the next mark written by docs/make_reference.py; change the source, then run `make docs`. -->"
HEAD_END = "<!-- By hand from here on. -->"
SECTIONS = ("Definition", "Method", "Read it with", "Elsewhere", "Source")
MEASURED_ABOVE = {  # by rooms above `measure`, which its table can not name
    "answer_s": "trilemma.search.cascade_cost:answer_costs",
    "energy_j_per_answer": "trilemma.search.cascade_cost:answer_costs",
}


def commands_page() -> str:
    """The help of every command that the program registers, those of groups included."""
    os.environ.update(COLUMNS="110", TERMINAL_WIDTH="110", NO_COLOR="1", TERM="dumb")
    os.environ.pop("FORCE_COLOR", None)  # the width is read when typer is imported
    import typer.main
    from typer.testing import CliRunner

    from trilemma.cli.main import app

    parts = [NOTE, "# Commands\n"]
    for names in _command_names(typer.main.get_command(app)):
        done = CliRunner().invoke(app, [*names, "--help"], prog_name="trilemma", catch_exceptions=False)
        shown = "\n".join(line.rstrip() for line in done.output.strip().splitlines())
        parts.append(f"\n## {' '.join(['trilemma', *names])}\n\n```\n{shown}\n```\n")
    return "".join(parts)


def _command_names(command: object, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inner = getattr(command, "commands", {})
    return [before, *(found for name, one in inner.items() for found in _command_names(one, (*before, name)))]


def documented_metrics() -> list[Metric]:
    """All of the vocabulary; the families of metrics of tasks as 'accuracy/<task>'."""
    return [*METRICS.values(), *(resolve_metric(f"{family}/<task>") for family in TASK_METRICS)]


def page_name(metric: str) -> str:
    """'tpot_s.md'; 'accuracy.md' for 'accuracy/<task>'."""
    return f"{metric.partition('/')[0]}.md"


def metrics_page() -> str:
    rows = [
        f"| [`{metric.name}`](metrics/{page_name(metric.name)}) | {_code(metric.alias)} | {metric.unit} |"
        f" {metric.direction} | {_what(metric)} |"
        for metric in documented_metrics()
    ]
    return (
        f"{NOTE}# Metrics\n\n"
        "A limit takes the name or the alias: `tpot<=20ms`, `weights<=50%`, `ppl_increase<=2%`. MB is 10^6 bytes.\n"
        "A name leads to its page: what exactly is counted, how it is measured, what to read it with, what others "
        "call it.\nHow sure a number is and what a verdict makes of it: "
        "[verdicts and intervals](../concepts/verdicts.md).\n\n"
        "| metric | alias | unit | better | what |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def metric_head(metric: Metric) -> str:
    """What the program itself says of a metric, down to `HEAD_END`."""
    synonyms = [other for other, name in SYNONYMS.items() if name == metric.name]
    sign = "<=" if metric.direction == "lower" else ">="
    rows = {
        "unit": metric.unit,
        "better": metric.direction,
        "in limits": f"`{metric.alias or metric.name}{sign}...`",
        "synonyms": ", ".join(_code(name) for name in synonyms) or "none",
        "measured by": _meter(metric.name) or "see Method",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"# `{metric.name}`\n\n{HEAD_NOTE}\n\n{_what(metric)[:1].upper()}{_what(metric)[1:]}.\n\n"
        f"| `{metric.name}` | |\n|---|---|\n{table}\n\n{HEAD_END}\n"
    )


def _meter(metric: str) -> str | None:
    """A link to the file that measures it, or None where no table says."""
    if metric in METERS:
        meter = METERS.get(metric)
        module, name = meter.__module__, meter.__qualname__
    elif metric in MEASURED_ABOVE:
        module, _, name = MEASURED_ABOVE[metric].partition(":")
    else:
        return None
    path = module.replace(".", "/")
    return f"[`{name}` of `{path.removeprefix('trilemma/')}.py`](../../../src/{path}.py)"


def _code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def _what(metric: Metric) -> str:
    return metric.what.replace("||", "‖")  # a bar would end the cell


def metric_pages(folder: Path) -> dict[Path, str]:
    """Every metric's page with the head as it should be; a page that is not there yet gets empty sections."""
    found = {}
    for metric in documented_metrics():
        path = folder / page_name(metric.name)
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        found[path] = metric_head(metric) + _body(old)
    return found


def _body(page: str) -> str:
    """What is by hand; where the mark was lost, all from the first section on."""
    _, mark, body = page.partition(f"{HEAD_END}\n")
    if not mark and "\n## " in page:
        body = page[page.index("\n## ") :]
    return body or "".join(f"\n## {name}\n" for name in SECTIONS)


def metric_faults(folder: Path) -> list[str]:
    """What is wrong with the pages of metrics: one line each, empty when all is well."""
    wanted = metric_pages(folder)
    faults = [f"{path.name} belongs to no metric" for path in sorted(folder.glob("*.md")) if path not in wanted]
    for path, text in wanted.items():
        if not path.exists():
            faults.append(f"{path.name} is missing")
            continue
        if path.read_text(encoding="utf-8") != text:
            faults.append(f"{path.name} has an old head; run `make docs`")
        sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", text, re.MULTILINE))
        empty = [name for name in SECTIONS if not sections.get(name, "").strip()]
        faults += [f"{path.name} says nothing under '{name}'" for name in empty]
        faults += [f"{path.name} has another section '{name}'" for name in sections if name not in SECTIONS]
    return faults


def unmeasured() -> list[str]:
    """Metrics of the vocabulary of which no table says where they are measured."""
    names = [metric.name for metric in documented_metrics()]
    return [f"METERS does not say where {name} is measured" for name in names if _meter(name) is None]


def python_page() -> str:
    parts = [NOTE, "# Python\n\nWhat `import trilemma` offers. Everything else may change without notice.\n"]
    for name in trilemma.__all__:
        thing = getattr(trilemma, name)
        kind = "class " if inspect.isclass(thing) else ""
        shown = "" if inspect.isclass(thing) else str(inspect.signature(thing)).replace("'", "")
        parts.append(f"\n## {name}\n\n```python\n{kind}trilemma.{name}{shown}\n```\n\n{inspect.getdoc(thing)}\n")
    return "".join(parts)


def pages() -> dict[Path, str]:
    return {
        REFERENCE / "commands.md": commands_page(),
        REFERENCE / "metrics.md": metrics_page(),
        REFERENCE / "python.md": python_page(),
        **metric_pages(REFERENCE / "metrics"),
    }


def main() -> None:
    found = pages()
    if "--check" in sys.argv:
        stale = [path for path, text in found.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        told = [f"{path.name} is out of date; run `make docs`" for path in stale if path.parent == REFERENCE]
        told += metric_faults(REFERENCE / "metrics") + unmeasured()
        if told:
            sys.exit("\n".join(told))
        return
    for path, text in found.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for fault in metric_faults(REFERENCE / "metrics") + unmeasured():
        print(fault, file=sys.stderr)


if __name__ == "__main__":
    main()
