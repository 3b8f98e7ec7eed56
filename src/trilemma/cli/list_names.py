"""`trilemma list`: what there is to choose from, read from the tables themselves."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import typer

from trilemma.cli import options

Kind = Literal["techniques", "formats", "schemes", "devices", "families", "engines", "exporters", "metrics", "sensors"]


def list_names(
    kind: Annotated[Kind | None, typer.Argument(help="Which table; all of them by default.")] = None,
    json: options.Json = False,
) -> None:
    """List techniques, formats, schemes, devices, families, engines, exporters, metrics and energy sensors."""
    from trilemma.cli import console

    tables = {each: _names(each) for each in ([kind] if kind else get_args(Kind))}
    if json:
        console.print_json(tables)
        return
    for title, rows in tables.items():
        typer.echo(title)
        for name, what in rows.items():
            typer.echo(f"  {name:<28} {what}".rstrip())


def _names(kind: Kind) -> dict[str, str]:
    """name -> one line about it, in the order of the table."""
    match kind:
        case "metrics":
            from trilemma.core.metric import METRICS

            return {metric.name: _metric_line(metric.alias, metric.unit, metric.what) for metric in METRICS.values()}
        case "formats":
            from trilemma.formats import FORMATS

            return {name: _format_line(FORMATS.get(name).bits, FORMATS.get(name).group) for name in FORMATS}
        case "schemes":
            from trilemma.techniques.schemes import list_schemes

            return list_schemes()
        case "techniques":
            from trilemma.techniques import TECHNIQUES

            return {name: _technique_line(name) for name in TECHNIQUES}
        case "families":
            from trilemma.model.families import FAMILIES

            return dict.fromkeys(FAMILIES, "")
        case "engines":
            from trilemma.runtime import ENGINES

            return dict.fromkeys(ENGINES, "")
        case "exporters":
            from trilemma.export import EXPORTERS

            return dict.fromkeys(EXPORTERS, "")
        case "sensors":
            from trilemma.measure.energy.sensors.survey import survey

            return survey()
        case "devices":
            from trilemma.core.device import DEVICES, load_device
            from trilemma.core.environment import cpu_name, total_memory_bytes, usable_cores

            host = f"{cpu_name()}, {usable_cores()} cores, {total_memory_bytes() / 1e9:.1f} GB"
            return {"host": host, **{name: load_device(name).title for name in DEVICES}}


def _technique_line(name: str) -> str:
    from trilemma.core.errors import MissingExtraError
    from trilemma.techniques import TECHNIQUES

    try:
        return TECHNIQUES.get(name).what
    except MissingExtraError as error:
        return f"not here: {error}"


def _metric_line(alias: str | None, unit: str, what: str) -> str:
    name = f"(limit name: {alias}) " if alias else ""
    return f"{name}{what}, {unit}"


def _format_line(bits: int, group: int | None) -> str:
    return f"{bits} bits" + (f", groups of {group}" if group else "")
