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
    from trilemma.cli import console
    from trilemma.core.errors import OutputError
    from trilemma.core.quantity import format_quantity
    from trilemma.export import EXPORTERS
    from trilemma.formats.artifact import load_any

    exporter = EXPORTERS.get(to)
    if output.exists() and not force:
        raise OutputError(f"'{output}' exists already. Give another path, or --force to replace it.")
    exporter(load_any(model), output)
    if json:
        console.print_json({"path": str(output), "bytes": output.stat().st_size, "to": to})
    else:
        typer.echo(f"{output}: {format_quantity(output.stat().st_size, 'bytes')}, {to}")
