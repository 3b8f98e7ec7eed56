"""`trilemma compress`: one recipe applied, without a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli import options


def compress(
    model: options.Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the artifact.")],
    scheme: Annotated[
        str | None, typer.Option("--scheme", help="Short name such as W4A8-g32-gptq; see `trilemma list schemes`.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="recipe.yaml, as an artifact carries it.")] = None,
    data: options.Data = None,
    prepare: options.PrepareText = "none",
    seed: options.Seed = 0,
    threads: options.Threads = None,
    force: options.Force = False,
    payback: Annotated[
        bool, typer.Option("--payback", help="Also time both models: after how many tokens building is repaid.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Apply a scheme or a recipe and write the artifact."""
    from trilemma.api import compress as apply
    from trilemma.cli import console
    from trilemma.core.errors import RecipeError

    if (scheme is None) == (recipe is None):
        raise RecipeError("Give one of --scheme (for example W4A8-g32-gptq) and --recipe (a recipe.yaml).")
    with console.progress("compress") as update:
        result = apply(
            model, output, scheme=scheme, recipe=recipe, data=data, prepare=prepare, seed=seed, threads=threads,
            force=force, payback=payback, progress=update,
        )  # fmt: skip
    if json:
        console.print_json(result)
    else:
        typer.echo(f"{output}: {result}")
        typer.echo(f"build energy {console.show(result.build['build_energy_j'])}")
        for found in result.payback:
            typer.echo(f"Payback: {found.text}.")
