"""`trilemma eval`: quality of one model against its reference, with intervals over documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli import options

METRICS = ("perplexity", "bits_per_byte", "ppl_increase", "kl_mean", "kl_p99", "kl_p999", "top1_agreement")


def evaluate(
    model: options.Model,
    data: options.NamedData,
    context: options.Context = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Unmodified model to compare with; adds KL and agreement.")
    ] = None,
    max_tokens: options.TextTokens = 30_000,
    prepare: options.PrepareText = "none",
    kv: options.KvCache = None,
    threads: options.Threads = None,
    isa: options.IsaChoice = None,
    runtime: options.Runtime = "native",
    json: options.Json = False,
) -> None:
    """Perplexity and bits per byte; against a reference also KL, agreement and the paired increase."""
    from trilemma.cli import console
    from trilemma.measure.evaluate import evaluate as measure
    from trilemma.runtime.engine import EngineOptions

    with console.progress("eval") as update:
        result = measure(
            model, by_domain(data), reference=reference, context=context, max_tokens=max_tokens, prepare=prepare,
            runtime=runtime, options=EngineOptions(threads=threads, kv_cache=kv, isa=isa), progress=update,
        )  # fmt: skip
    if json:
        console.print_json(result)
        return
    shown = [metric for metric in METRICS if metric in result.rows[0].measurements]
    rows = [
        [row.domain, str(row.documents), f"{row.tokens:,}", *(console.show(row.measurements[m]) for m in shown)]
        for row in result.rows
    ]
    console.table(f"{model}, context {result.context}", ["domain", "documents", "tokens", *shown], rows)
    for note in result.notes:
        typer.echo(note)


def by_domain(data: list[str]) -> dict[str, list[Path]] | list[Path]:
    """`--data file` or `--data name=file`; the name of a file's domain is its own unless one is given."""
    if not any("=" in item for item in data):
        return [Path(item) for item in data]
    domains: dict[str, list[Path]] = {}
    for item in data:
        name, _, path = item.rpartition("=")
        domains.setdefault(name or Path(path).name.split(".")[0], []).append(Path(path))
    return domains
