"""What `trilemma inspect --diagnose` and `--waterfall` print: what binds, how that was tested, what would help."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from trilemma.core.diagnosis import Complaint, Diagnosis, Ratio

GAINS = {"tpot": "time/token", "ttft": "first token", "memory": "memory", "energy": "energy", "cost": "cost/token"}
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
    from trilemma.search.diagnose import diagnose as measure

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
        [phase.phase, format_quantity(phase.seconds.value, "s"), *(_share(phase.shares[cause]) for cause in phase.shares)]
        for phase in found.phases
    ]  # fmt: skip
    console.table("What its time answers to (95% intervals)", ["", "time", *found.phases[0].shares], rows)
    typer.echo("")
    rows = [
        [probe.phase, probe.changed, probe.held, _times(probe.ratio, interval=True), probe.says]
        for probe in found.probes
    ]
    console.table("How that was tested", ["", "changed", "held", "time", "why"], rows)
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
        "A twin says nothing of quality: remedies that change the model or its input need `trilemma eval` or `optimize`."
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
