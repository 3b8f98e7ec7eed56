"""`trilemma report`: render a run's record as one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli import options


def report(
    source: Annotated[Path, typer.Argument(help="Artifact folder, its report.json, or what `bench --save` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path("report.html"),
    force: options.Force = False,
) -> None:
    """Render the record of `optimize` or `bench` as a self-contained HTML page."""
    from trilemma.core.errors import InputError, OutputError
    from trilemma.core.files import write_whole

    path = source / "report.json" if source.is_dir() else source
    if not path.is_file():
        raise InputError(f"There is no report at '{path}'. Give a folder that `trilemma optimize` wrote.")
    if output.exists() and not force and not _is_a_page(output):
        raise OutputError(f"'{output}' exists and is no HTML page. Give another path, or --force to replace it.")
    write_whole(output, _render(path.read_text(encoding="utf-8")))
    typer.echo(str(output))


def _is_a_page(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:200].lstrip().lower().startswith(b"<!doctype html")


def _render(text: str) -> str:
    """The panel says which record it is: cost and quality have pages of their own and are never mixed."""
    import json

    from trilemma.core.results import read_bench, read_report
    from trilemma.report import render, render_cost

    try:
        panel = json.loads(text).get("panel")
    except (ValueError, AttributeError):
        panel = None
    return render_cost(read_bench(text)) if panel == "cost" else render(read_report(text))
