"""`trilemma report`: render report.json as one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    source: Annotated[Path, typer.Argument(help="Artifact folder or report.json.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Render a run's report.json as a self-contained HTML page."""
    from trilemma.core.errors import InputError
    from trilemma.core.results import read_report
    from trilemma.report import render

    path = source / "report.json" if source.is_dir() else source
    if not path.is_file():
        raise InputError(
            f"There is no report at '{path}'. Give a folder that `trilemma optimize` wrote, or a report.json."
        )
    output.write_text(render(read_report(path.read_text(encoding="utf-8"))), encoding="utf-8")
    typer.echo(str(output))
