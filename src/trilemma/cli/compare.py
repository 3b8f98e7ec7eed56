"""`trilemma compare`: several models side by side: bytes, time, memory and, with a text, quality."""

from __future__ import annotations

from typing import Annotated

import typer

from trilemma.cli import options


def compare(
    models: Annotated[list[str], typer.Argument(help="Two or more models; the first is the reference.")],
    data: options.Data = None,
    context: options.Context = None,
    threads: options.Threads = None,
    runtime: options.Runtime = "native",
    json: options.Json = False,
) -> None:
    """Compare models on the same text and machine; the first is the reference."""
