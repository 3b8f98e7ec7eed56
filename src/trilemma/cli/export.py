"""`trilemma export`: write an artifact in another runtime's form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli import options


def export(
    model: options.Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    to: Annotated[str, typer.Option("--to", help="Form; see `trilemma list exporters`.")] = "gguf",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write a model in another runtime's form; what lies on the same grid goes out bit for bit."""
    from trilemma.api import export_model
    from trilemma.cli import console
    from trilemma.core.quantity import format_quantity

    export_model(model, output, to=to, force=force)
    if json:
        console.print_json({"path": str(output), "bytes": output.stat().st_size, "to": to})
    else:
        typer.echo(f"{output}: {format_quantity(output.stat().st_size, 'bytes')}, {to}")
