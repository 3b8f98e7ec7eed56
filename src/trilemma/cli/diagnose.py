"""What `trilemma inspect --diagnose` and `--waterfall` print: what binds, how that was tested, what would help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from pathlib import Path

    from trilemma.core.diagnosis import Complaint, Diagnosis, Ratio
    from trilemma.core.waterfall import WaterfallStep

GAINS = {"tpot": "time/token", "ttft": "first token", "memory": "memory", "energy": "energy", "cost": "cost/token"}
WATERFALL = ("weights_bytes", "engine_memory_bytes", "ttft_s", "tpot_s", "ppl_increase", "kl_mean")
_MARKS = {"measured": "", "predicted": "?", "estimated": "~"}


def diagnose(
    model: str,
    *,
    complaint: Complaint | None,
    prompt: int,
    output: int,
    threads: int | None,
    kv: options.Kv | None,
    json: bool,
) -> None:
    """Measure, test and print; `inspect` hands its options over."""
    from trilemma.cli import console
    from trilemma.search.diagnosis.diagnose import diagnose as measure

    with console.progress("diagnose") as update:
        found = measure(
            model, prompt_tokens=prompt, output_tokens=output, threads=threads, kv=kv, complaint=complaint,
            progress=update,
        )  # fmt: skip
    if json:
        console.print_json(found)
    else:
        _show(found)


def _show(found: Diagnosis) -> None:
    from trilemma.cli import console
    from trilemma.core.quantity import format_percent, format_quantity

    here = found.environment
    typer.echo(f"{found.model}: {found.architecture}")
    typer.echo(f"measured     {found.deployed}")
    typer.echo(
        f"where        {here.cpu}, {here.isa}, {here.threads} threads; "
        f"{found.prompt_tokens} prompt and {found.output_tokens} output tokens"
    )
    typer.echo(
        f"bytes        weights {format_quantity(found.weights_bytes, 'bytes')}, KV cache at this length "
        f"{format_quantity(found.kv_bytes, 'bytes')}: {format_percent(found.kv_share_of_bytes)} of what a token reads"
    )
    typer.echo(
        f"ceilings     {found.read_bandwidth_bytes_per_s / 1e9:,.1f} GB/s read over this model's bytes, "
        f"{found.compute_macs_per_s / 1e9:,.1f} GMAC/s in its format"
    )
    typer.echo("")
    for phase in found.phases:
        typer.echo(f"{phase.sentence}.")
    typer.echo("")
    rows = [
        [each.phase, format_quantity(each.seconds.value, "s"), *(_share(each.shares[cause]) for cause in each.shares)]
        for each in found.phases
    ]
    console.table("What its time answers to (95% intervals)", ["", "time", *found.phases[0].shares], rows)
    typer.echo("")
    rows = [
        [f"{probe.phase}, {probe.changed}", _times(probe.ratio, interval=True), f"{probe.held} held: {probe.says}"]
        for probe in found.probes
    ]
    console.table("How that was tested", ["", "time", "why"], rows)
    _show_remedies(found)
    if found.noisy:
        typer.echo(f"\nThe machine was not quiet ({found.noisy}); ratios are paired, so they stand better than times.")
    for note in found.notes:
        typer.echo(note)


def _show_remedies(found: Diagnosis) -> None:
    from trilemma.cli import console

    wanted = {"slow": "time", "large": "memory", "hungry": "energy"}.get(found.complaint or "", "time")
    for kind in dict.fromkeys(remedy.kind for remedy in found.remedies):
        rows = [
            [remedy.name, *(_times(remedy.gains.get(metric)) for metric in GAINS), _why(remedy.what, remedy.note)]
            for remedy in found.remedies if remedy.kind == kind
        ]  # fmt: skip
        typer.echo("")
        console.table(f"Remedies: {kind}, most {wanted} first", ["", *GAINS.values(), "why"], rows)
        for remedy in found.remedies:
            if remedy.kind == kind:
                typer.echo(f"  {remedy.name}: {remedy.command}")
    typer.echo(
        "\nx is after over before on this model, measured on a twin; ? predicted from the shares above; ~ estimated. "
        "A twin says nothing of quality: what changes the model or its input needs `trilemma eval` or `optimize`."
    )


def _why(what: str, note: str) -> str:
    return f"{what}; {note}" if note else what


def _share(share: Ratio) -> str:
    edges = "" if share.low is None or share.high is None else f" [{share.low:.0%}, {share.high:.0%}]"
    return f"{share.value:.0%}{edges}"


def _times(ratio: Ratio | None, *, interval: bool = False) -> str:
    if ratio is None:
        return "—"
    edges = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if interval and ratio.low is not None and ratio.high else ""
    return f"x{ratio.value:.2f}{edges}{_MARKS[ratio.source]}"


def waterfall(
    model: str,
    recipe: str,
    *,
    data: list[Path] | None,
    prepare: Literal["none", "book"],
    plot: Path | None,
    prompt: int,
    output: int,
    threads: int | None,
    kv: options.Kv | None,
    json: bool,
) -> None:
    """Build and measure every prefix of a recipe, print the table, write the picture."""
    from trilemma.cli import console
    from trilemma.report.plot import check_plot_path, write_plot
    from trilemma.report.waterfall import waterfall_plot
    from trilemma.search.waterfall import waterfall as measure

    check_plot_path(plot)
    with console.progress("waterfall") as update:
        found = measure(
            model, recipe, data=data, prepare=prepare, prompt_tokens=prompt, output_tokens=output, threads=threads,
            kv=kv, progress=update,
        )  # fmt: skip
    if plot is not None:
        write_plot(plot, waterfall_plot(found))
    if json:
        console.print_json(found)
        return
    shown = [metric for metric in WATERFALL if any(metric in step.measurements for step in found.steps)]
    rows = [[step.name, *(_cell(step, metric) for metric in shown), f"{step.build_s:.1f} s"] for step in found.steps]
    console.table(f"{found.model}: what each step of {found.recipe} changes", ["", *shown, "build"], rows)
    typer.echo("x is after over before that step, paired in time; " + "; ".join(found.notes) + ".")


def _cell(step: WaterfallStep, metric: str) -> str:
    from trilemma.cli.console import show

    measured = step.measurements.get(metric)
    if measured is None:
        return "—"
    plain = show(measured.model_copy(update={"ci95": None}))
    pair = step.ratios.get(metric)
    if pair is None:
        return plain if metric not in ("ppl_increase", "kl_mean") else show(measured)
    low, high = pair[1], pair[2]
    edges = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None and low != high else ""
    return f"{plain} x{pair[0]:.2f}{edges}"
