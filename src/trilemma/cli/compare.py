"""`trilemma compare`: several models side by side: bytes, time, memory and, with a text, quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli import options
from trilemma.core.errors import InputError

if TYPE_CHECKING:
    from trilemma.measure.results import CompareResult, CompareRow

METRICS = (
    "weights_bytes", "engine_memory_bytes", "ttft_s", "tpot_s", "energy_j_per_output_token", "perplexity",
    "ppl_increase", "kl_mean", "top1_agreement",
)  # fmt: skip


def compare(
    models: Annotated[
        list[str], typer.Argument(help="Two or more models, the first is the reference; one with --ladder.")
    ],
    data: options.SomeNamedData = None,
    context: options.Context = None,
    max_tokens: options.TextTokens = 30_000,
    prepare: options.PrepareText = "none",
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Prompt tokens of the timing.")] = 128,
    output: Annotated[int, typer.Option("--output", min=2, help="Output tokens of the timing.")] = 32,
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Timed ones, after a discarded round.")] = 5,
    kv: options.KvCache = None,
    threads: options.Threads = None,
    isa: options.IsaChoice = None,
    runtime: options.Runtime = "native",
    ladder: Annotated[
        bool,
        typer.Option("--ladder", help="One model in every precision: costs, instabilities, repairs and their price."),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="KL over memory and over time as FILE.svg; with --ladder a triangle each."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Compare models on the same text and machine, interleaved and paired; the first is the reference."""
    if ladder and (kv or isa or runtime != "native"):
        raise InputError("The ladder opens every engine in its own way. Leave --kv, --isa and --runtime out.")
    if ladder:
        from trilemma.cli import ladder as precisions

        precisions.run(
            models, data, context=context, max_tokens=max_tokens, prepare=prepare, prompt=prompt, output=output,
            repetitions=repetitions, threads=threads, plot=plot, json=json,
        )  # fmt: skip
        return
    from trilemma.cli import console
    from trilemma.cli.evaluate import by_domain
    from trilemma.measure.compare import compare as measure
    from trilemma.report.plot import check_plot_path, write_plot
    from trilemma.runtime.engine import EngineOptions

    check_plot_path(plot)
    if plot is not None and not data:
        raise InputError("--plot draws quality over cost: give text with --data.")
    with console.progress("compare") as update:
        result = measure(
            models, by_domain(data) if data else None, context=context, max_tokens=max_tokens, prepare=prepare,
            prompt_tokens=prompt, output_tokens=output, repetitions=repetitions, runtime=runtime,
            options=EngineOptions(threads=threads, kv_cache=kv, isa=isa), progress=update,
        )  # fmt: skip
    if plot is not None:
        write_plot(plot, _plot(result))
    if json:
        console.print_json(result)
        return
    shown = [metric for metric in METRICS if any(metric in row.measurements for row in result.rows)]
    # Models stand side by side, so metrics are the rows.
    rows = [[metric, *(_cell(row, metric) for row in result.rows)] for metric in shown]
    console.table("The first is the reference; x is paired to it", ["metric", *(row.name for row in result.rows)], rows)
    for note in result.notes:
        typer.echo(note)


def _plot(result: CompareResult) -> str:
    """All but the reference, which has no divergence from itself."""
    from trilemma.report.triangle import Version
    from trilemma.report.versions_chart import versions_chart

    def value(row: CompareRow, metric: str) -> float:
        return row.measurements[metric].value or 0.0

    versions = [
        Version(row.name, value(row, "weights_bytes"), value(row, "tpot_s"), value(row, "kl_mean"))
        for row in result.rows[1:]
    ]
    first = result.rows[0]
    marks = (value(first, "weights_bytes"), value(first, "tpot_s"))
    return versions_chart(versions, title=f"What each version loses, beside {first.name}", reference=marks)


def _cell(row: CompareRow, metric: str) -> str:
    from trilemma.cli.console import show

    pair = row.relative.get(metric)
    return show(row.measurements.get(metric)) + ("" if pair is None else f" x{pair[0]:.2f}")
