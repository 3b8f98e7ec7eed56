"""`trilemma optimize`: limits in, a smaller measured model and a reasoned choice out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from trilemma.core.results import OptimizeReport
    from trilemma.core.verdict import Verdict


def optimize(
    model: options.Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the chosen model and its evidence.")],
    data: options.Data = None,
    limit: Annotated[
        list[str] | None,
        typer.Option("--limit", help="'weights<=50%', 'tpot<=20ms', 'ppl_increase<=2%', ... May be repeated."),
    ] = None,
    time: Annotated[str, typer.Option("--time", help="Effort: '20s', '5m', '1h'.")] = "10m",
    minimize: Annotated[
        str | None,
        typer.Option("--minimize", help="Metric to minimize within the limits; see `trilemma list metrics`."),
    ] = None,
    runtime: options.Runtime = "native",
    context: options.Context = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    accept_estimates: Annotated[
        bool, typer.Option("--accept-estimates", help="Let an estimate PASS a limit (energy without a counter).")
    ] = False,
    device: options.OtherDevice = None,
    duty_cycle: options.Duty = None,
    prepare: options.PrepareText = "none",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Try recipes, measure the promising ones, and leave the best model within the limits with its evidence."""
    from trilemma.api import optimize as search
    from trilemma.cli import console
    from trilemma.core.environment import command_line

    with console.search_progress("optimize") as update:
        result = search(
            model,
            limits=limit or [],
            data=data,
            output=output,
            time=time,
            minimize=minimize,
            runtime=runtime,
            context=context,
            prepare=prepare,
            seed=seed,
            threads=threads,
            accept_estimates=accept_estimates,
            device=device,
            duty_cycle=duty_cycle,
            force=force,
            progress=update,
            command=command_line(),
        )
    if json:
        console.print_json(result.report)
    else:
        show_report(result.report)
    raise typer.Exit(result.exit_code)


def show_report(report: OptimizeReport) -> None:
    """The front, a verdict per limit and the decision, as tables on stdout."""
    from trilemma.cli import console

    trials = {trial.name: trial for trial in (report.baseline, *report.trials)}
    metrics = ("weights_bytes", "tpot_s", "ttft_s", "ppl_increase", "kl_mean", "top1_agreement",
               "energy_j_per_output_token", "build_s")  # fmt: skip
    chosen = [report.decision.chosen] if report.decision.chosen else []
    names = list(dict.fromkeys((report.baseline.name, *report.front, *chosen)))
    rows = [
        [("* " if name == report.decision.chosen else "  ") + name]
        + [console.show(trials[name].measurements.get(metric)) for metric in metrics]
        for name in names
        if name in trials
    ]
    titles = [{"energy_j_per_output_token": "energy a token"}.get(metric, metric) for metric in metrics]
    console.table("The front (* chosen)", ["trial", *titles], rows)
    typer.echo("")
    show_verdicts(report.verdicts)
    typer.echo(report.decision.sentence)
    for found in report.payback:
        typer.echo(f"Payback: {found.text}.")
    if report.decision.alternatives:
        named = ", ".join(f"{kind} {name}" for kind, name in report.decision.alternatives.items())
        typer.echo(f"Within the limits: {named}.")


def show_verdicts(verdicts: tuple[Verdict, ...]) -> None:
    """One row a limit: outcome, value with interval, threshold and what would settle it."""
    from trilemma.cli import console
    from trilemma.core.quantity import format_quantity

    if not verdicts:
        return
    rows = [
        [
            verdict.limit.text,
            verdict.outcome,
            console.show(verdict.measurement),
            "—" if verdict.threshold is None else format_quantity(verdict.threshold, verdict.measurement.unit),
            verdict.settle or verdict.reason,
        ]
        for verdict in verdicts
    ]
    console.table("Verdicts", ["limit", "verdict", "value [95% interval]", "threshold", "why"], rows)
    typer.echo("")
