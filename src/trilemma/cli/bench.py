"""`trilemma bench`: what models cost on this machine, interleaved, with the noise watched."""

from __future__ import annotations

from typing import Annotated

import typer

from trilemma.cli import options


def bench(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints, artifacts or bare config.json files (random weights: cost only).")
    ],
    scheme: Annotated[
        list[str] | None,
        typer.Option("--scheme", "--format", help="Forms to measure, by comma or repeated: bf16,W8A8,int4-g32."),
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Prompt tokens.")] = 128,
    output: Annotated[int, typer.Option("--output", min=2, help="Output tokens.")] = 32,
    kv: options.KvCache = None,
    threads: options.Threads = None,
    isa: options.IsaChoice = None,
    runtime: options.Runtime = "native",
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Timed repetitions after warming up.")] = 5,
    form: Annotated[options.TableForm, typer.Option("-o", "--as", help="Form of the table.")] = "md",
    json: options.Json = False,
) -> None:
    """Measure time and memory of models in several forms side by side."""
