"""`trilemma profile`: measures this host once, into a device profile that can be carried elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from trilemma.core.device import Device
    from trilemma.core.host_tables import HostTables


def profile(
    out: Annotated[Path, typer.Option("-o", "--out", help="Profile to write.")] = Path("host.yaml"),
    name: Annotated[str, typer.Option("--name", help="What the device is called in the profile.")] = "host",
    threads: Annotated[
        list[str] | None,
        typer.Option("--threads", help="Numbers of threads to time kernels with, 1,2; all usable cores by default."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A thinner table in about a minute; less sure.")] = False,
    check: Annotated[
        Path | None,
        typer.Option("--check", help="Run only the check cases against this profile, and keep their errors in it."),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Measure this host's bandwidth, rates and kernel times, so that times of any model can be predicted for it."""
    from trilemma.cli import console
    from trilemma.core.device import write_device
    from trilemma.core.errors import OutputError
    from trilemma.core.files import write_whole

    target = check or out
    if check is None and out.exists() and not force:
        raise OutputError(f"'{out}' is there already. Give another path with -o, or --force to replace it.")
    if not target.parent.is_dir():
        raise OutputError(f"The folder '{target.parent}' does not exist. Make it first, or give another path.")
    device = _checked(check) if check is not None else _measured(name, _counts(threads), quick, target)
    write_whole(target, write_device(device))
    if json:
        console.print_json(device)
        return
    _show(device)
    typer.echo(
        f"Written to {target}. Predict with: trilemma inspect MODEL --device {target} --scheme bf16,W8A8,W4A8-g32"
    )


def _measured(name: str, threads: list[int] | None, quick: bool, target: Path) -> Device:
    from trilemma.cli import console
    from trilemma.measure.device.host_profile import QUICK, Effort, profile_host

    with console.progress("profile") as update:
        return profile_host(
            name=name, threads=threads, effort=QUICK if quick else Effort(), folder=target.parent, progress=update
        )


def _checked(path: Path) -> Device:
    from trilemma.cli import console
    from trilemma.core.device import load_device
    from trilemma.measure.device.check_cases import check
    from trilemma.measure.device.host_profile import with_checks

    device = load_device(path)
    with console.progress("check cases") as update:
        return with_checks(device, check(device, progress=lambda share: update(share, 1.0, "check cases")))


def _counts(given: list[str] | None) -> list[int] | None:
    from trilemma.core.environment import usable_cores
    from trilemma.core.errors import InputError

    names = options.split_names(given)
    bad = [name for name in names if not name.isdigit() or not 1 <= int(name) <= usable_cores()]
    if bad:
        raise InputError(f"--threads takes numbers from 1 to {usable_cores()} (the usable cores), not '{bad[0]}'.")
    return [int(name) for name in names] or None


def _show(device: Device) -> None:
    from trilemma.cli import console
    from trilemma.core.quantity import format_quantity

    tables = device.host
    assert tables is not None
    typer.echo(f"{device.name}: {device.title}, {tables.isa}, {tables.measured}")
    typer.echo(f"figures: {tables.method}")
    if tables.noisy:
        typer.echo(f"noisy: {tables.noisy}. Close other programs and profile again before you trust small differences.")
    _show_rates(tables)
    typer.echo(
        f"overhead     {format_quantity(device.overhead_s.value, 's')} a token at 24 layers x 1024; "
        f"waking threads {format_quantity(tables.wake_s, 's')}"
    )
    typer.echo(f"storage      {device.storage_bytes_per_s.value / 1e9:.2f} GB/s ({device.storage_bytes_per_s.basis})")
    typer.echo(
        f"power        idle {device.idle_w.value:.3g} W, at work {device.active_w.value:.3g} W "
        f"({device.idle_w.basis}: {device.idle_w.claim})"
    )
    rows = [
        [case.name, case.quantity, format_quantity(case.predicted_s, "s"), format_quantity(case.measured_s, "s"),
         f"{case.predicted_s / case.measured_s - 1:+.0%}"]
        for case in tables.checks
    ]  # fmt: skip
    console.table("Check cases, not in the tables", ["model", "what", "predicted", "measured", "off by"], rows)
    for line in error_lines(tables):
        typer.echo(line)


def _show_rates(tables: HostTables) -> None:
    from trilemma.cli import console

    levels = list(dict.fromkeys(rate.level for rate in tables.read_rates))
    by_threads: dict[int, dict[str, float]] = {}
    for rate in tables.read_rates:
        by_threads.setdefault(rate.threads, {})[rate.level] = rate.bytes_per_s
    rows = [[str(n), *(f"{found[level] / 1e9:.1f}" for level in levels)] for n, found in by_threads.items()]
    console.table("Reading, GB/s", ["threads", *levels], rows)
    rows = [[f"{r.isa}, {r.precision}", str(r.threads), f"{r.macs_per_s / 1e9:,.1f}"] for r in tables.mac_rates]
    console.table("Most multiply-accumulates of the kernels, G/s", ["instructions", "threads", "rate"], rows)


def error_lines(tables: HostTables) -> list[str]:
    """What the check cases say of predictions, in words."""
    import numpy as np

    lines = []
    for quantity, what in (("tpot_s", "time per token"), ("ttft_s", "first token")):
        errors = tables.errors("tpot_s" if quantity == "tpot_s" else "ttft_s")
        if errors:
            lines.append(
                f"{what}: median error {np.median(errors):.0%}, 90th percentile {np.quantile(errors, 0.9):.0%} "
                f"over {len(errors)} models that are not in the tables"
            )
    return lines or ["no check cases were run: the error of predictions is not known (trilemma profile --check)"]
