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
    bits: Annotated[
        float | None,
        typer.Option("--bits", help="Bits a matrix value may take, scales included; each tensor gets its own format."),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--formats", help="With --bits: formats to choose from; see `trilemma list formats`."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="With --bits: rtn, gptq, gptaq or guided (default: least KL, needs gradients)."),
    ] = None,
    tpot_ms: Annotated[
        float | None,
        typer.Option("--tpot-ms", help="With --bits: milliseconds a token may take here, by times of its products."),
    ] = None,
    data: options.Data = None,
    prepare: options.PrepareText = "none",
    seed: options.Seed = 0,
    threads: options.Threads = None,
    device: options.TorchDevice = "cpu",
    force: options.Force = False,
    payback: Annotated[
        bool, typer.Option("--payback", help="Also time both models: after how many tokens building is repaid.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Apply a scheme or a recipe, or share out bits by measured KL, and write the artifact."""
    from trilemma.api import compress as apply
    from trilemma.cli import console
    from trilemma.core.errors import RecipeError

    given = [name for name, value in (("scheme", scheme), ("recipe", recipe), ("bits", bits)) if value is not None]
    if len(given) != 1 and given != ["scheme", "bits"]:
        raise RecipeError(
            "Give one of --scheme (for example W4A8-g32-gptq), --recipe (a recipe.yaml) and --bits (for example 4.5; "
            "a scheme beside it prepares and tunes the model: --scheme smooth+scales100)."
        )
    with console.progress("compress") as update:
        result = apply(
            model, output, scheme=scheme, recipe=recipe, bits=bits, formats=options.split_names(formats), method=method,
            tpot_ms=tpot_ms, data=data, prepare=prepare, seed=seed, threads=threads, device=device, force=force,
            payback=payback, progress=update,
        )  # fmt: skip
    if json:
        console.print_json(result)
    else:
        typer.echo(f"{output}: {result}")
        for note in result.notes:
            typer.echo(note)
        typer.echo(f"build energy {console.show(result.build['build_energy_j'])}")
        for found in result.payback:
            typer.echo(f"Payback: {found.text}.")
