"""`trilemma export`: write an artifact in another runtime's form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli import options


def export(
    model: options.Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write, or folder for compressed-tensors.")],
    to: Annotated[str, typer.Option("--to", help="Form; see `trilemma list exporters`.")] = "gguf",
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round again what the target has no grid for; the loss is stated.")
    ] = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write a model in another runtime's form; what lies on the same grid goes out bit for bit."""
    from trilemma.api import export_model
    from trilemma.cli import console
    from trilemma.core.quantity import format_quantity

    report = export_model(model, output, to=to, requantize=requantize, force=force)
    if json:
        console.print_json(report)
        return
    types = ", ".join(f"{count} x {name}" for name, count in report.types.items())
    how = "every value as it was" if report.lossless else "not every value is as it was"
    typer.echo(f"{report.path}: {format_quantity(report.bytes, 'bytes')}, {to} ({types}), {how}")
    for note in report.notes:
        console.stderr.print(f"note: {note}", markup=False)
