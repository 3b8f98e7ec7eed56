"""`trilemma compare --ladder`: tables and sentences of a precision ladder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from trilemma.core.ladder import Ladder, Rung

HEADERS = [
    "precision", "weights", "time a token", "of f32", "GB/s", "of bandwidth", "prefill of f32", "GMAC/s", "of ceiling",
    "ppl increase", "KL", "agreement", "build",
]  # fmt: skip


def show(ladder: Ladder) -> None:
    """The ladder as a table on stdout, then what its figures say."""
    from trilemma.cli import console

    title = f"{ladder.model}, context {ladder.context}, {ladder.prompt_tokens} + {ladder.output_tokens} tokens timed"
    console.table(title, HEADERS, [_row(rung) for rung in ladder.rungs])
    typer.echo("")
    for sentence in ladder.findings:
        typer.echo(f"- {sentence}")
    for note in ladder.notes:
        typer.echo(f"note: {note}")


def _row(rung: Rung) -> list[str]:
    from trilemma.cli.console import show as shown
    from trilemma.core.quantity import format_percent

    found = rung.measurements
    build, kl = found.get("build_s"), found.get("kl_mean")
    increase, agreement = found.get("ppl_increase"), found.get("top1_agreement")

    def part(value: float | None, scale: float = 1.0) -> str:
        return "—" if value is None else f"{value * scale:,.1f}" if scale != 1.0 else f"{value:.0%}"

    def ratio(metric: str) -> str:
        pair = rung.relative.get(metric)
        return "—" if pair is None else f"{pair[0]:.0%}"

    return [
        rung.name,
        shown(found.get("weights_bytes")),
        shown(found.get("tpot_s")).partition(" [")[0],
        ratio("tpot_s"),
        part(rung.decode_bytes_per_s, 1e-9),
        part(rung.bandwidth_share),
        ratio("ttft_s"),
        part(rung.prefill_macs_per_s, 1e-9),
        part(rung.compute_share),
        "—" if increase is None or increase.value is None else format_percent(increase.value, signed=True),
        "not finite" if rung.failed and rung.runtime != "native" else shown(kl).partition(" [")[0],
        "—" if agreement is None or agreement.value is None else format_percent(agreement.value),
        shown(build),
    ]


def run(
    models: list[str],
    data: list[str] | None,
    *,
    context: int | None,
    max_tokens: int,
    prepare: Literal["none", "book"],
    prompt: int | None,
    output: int | None,
    repetitions: int,
    threads: int | None,
    plot: Path | None,
    json: bool,
) -> None:
    """Measure and show. Raises InputError for several models, DataError without text."""
    from trilemma.cli import console
    from trilemma.core.errors import DataError, InputError
    from trilemma.report.plot import check_plot_path, write_plot
    from trilemma.report.triangle import ladder_triangles
    from trilemma.search.ladder import measure_ladder as measure

    if len(models) != 1:
        raise InputError(f"--ladder takes one model, not {len(models)}: {', '.join(models)}.")
    if not data:
        raise DataError("The ladder measures quality and needs text. Give some with --data FILE.")
    check_plot_path(plot)
    with console.progress("ladder") as update:
        found = measure(
            models[0], [item.rpartition("=")[2] for item in data], context=context, max_tokens=max_tokens,
            prepare=prepare, prompt_tokens=prompt, output_tokens=output, repetitions=repetitions, threads=threads,
            progress=update,
        )  # fmt: skip
    if plot is not None:
        write_plot(plot, ladder_triangles(found))
    if json:
        console.print_json(found)
    else:
        show(found)
