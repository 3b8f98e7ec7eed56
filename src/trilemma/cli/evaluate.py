"""`trilemma eval`: quality of one model against its reference, with intervals over documents."""

from __future__ import annotations

from typing import Annotated

import typer

from trilemma.cli import options


def evaluate(
    model: options.Model,
    data: options.Data = None,
    context: options.Context = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Unmodified model to compare with; adds KL and agreement.")
    ] = None,
    threads: options.Threads = None,
    runtime: options.Runtime = "native",
    json: options.Json = False,
) -> None:
    """Perplexity and bits per byte; against a reference also KL, agreement and the paired increase."""
