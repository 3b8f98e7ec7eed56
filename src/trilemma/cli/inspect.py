"""`trilemma inspect`: what a model is and would cost, by arithmetic on its headers; no weight is read."""

from __future__ import annotations

import typer

from trilemma.cli import options


def inspect(
    model: options.Model,
    context: options.Context = None,
    json: options.Json = False,
) -> None:
    """Parameters, bytes by format, KV cache and work per token, from the headers alone."""
    from trilemma.cli import console
    from trilemma.formats.artifact import load_any
    from trilemma.model.cost import inspect_model

    inspection = inspect_model(load_any(model))
    if json:
        console.print_json(inspection)
        return
    typer.echo(inspection)
