"""`trilemma check`: the stored limits, measured again on the machine at hand; made for CI and for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli import options


def check(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder that `optimize` wrote.")],
    data: options.Data = None,
    original: Annotated[
        str | None, typer.Option("--original", help="The unmodified model, when it is no longer where the report says.")
    ] = None,
    threads: options.Threads = None,
    accept_estimates: Annotated[
        bool | None,
        typer.Option("--accept-estimates", help="Let an estimate PASS a limit; as in the report by default."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure the limits stored in an artifact again, here and now, and print the verdicts."""
    from trilemma.cli import console
    from trilemma.cli.optimize import show_verdicts
    from trilemma.search.check import check as measure_again

    with console.search_progress("check") as update:
        result = measure_again(
            artifact, data=data, original=original, threads=threads, accept_estimates=accept_estimates, progress=update
        )
    if json:
        console.print_json({"verdicts": result.verdicts, "exit_code": result.exit_code, "notes": result.notes})
    else:
        show_verdicts(result.verdicts)
        for note in result.notes:
            console.stderr.print(f"note: {note}", markup=False)
    raise typer.Exit(result.exit_code)
