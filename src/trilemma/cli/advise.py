"""`trilemma advise`: which strategy fits a scenario, why, and what would change that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from trilemma.core.advice import Advice, Strategy, Swap


def advise(
    scenario: Annotated[Path, typer.Argument(help="Scenario file (YAML); see examples/scenarios.")],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="SVG file to write: cost a month by requests a day.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List every input that can change the winner.")] = False,
    json: options.Json = False,
) -> None:
    """Rank strategies (on the device, on a server, remote, cascade) for a scenario, with what would change it."""
    from trilemma.cli import console
    from trilemma.report.plot import check_plot_path, write_plot
    from trilemma.search.strategies.advise import advise as weigh

    check_plot_path(plot)
    found = weigh(scenario)
    if plot is not None:
        from trilemma.report.advice import cost_plot
        from trilemma.search.strategies.curve import cost_by_requests

        write_plot(plot, cost_plot(found, cost_by_requests(scenario)))
    if json:
        console.print_json({**found.model_dump(mode="json"), "winner": found.winner})
    else:
        _show(found, every)
    if found.winner is None:
        raise typer.Exit(3)


def _show(found: Advice, every: bool) -> None:
    typer.echo(found.scenario)
    if found.question:
        typer.echo(found.question)
    typer.echo("")
    if found.winner is None:
        typer.echo("No strategy keeps every constraint.")
    else:
        typer.echo(f"{found.winner}: {found.reasons[found.winner]}.")
    typer.echo("")
    _show_strategies(found)
    _show_swaps(found.swaps if every else _nearest(found.swaps), len(found.swaps))
    if found.steady:
        typer.echo(f"\n{len(found.steady)} other numbers change nothing between a thousandth and a thousand times.")
    assumed = sum(text.lower().startswith("assum") for text in found.assumptions.values())
    typer.echo(f"Of {len(found.assumptions)} notes on where the numbers are from, {assumed} are assumptions.")


def _show_strategies(found: Advice) -> None:
    from trilemma.cli import console

    failing = [item for item in found.strategies if not item.feasible]
    order = [found.strategy(name) for name in found.ranking] + failing
    rows = [
        [str(index + 1) if item.feasible else "no", item.name, *_figures(item, found.currency), _why(item, found)]
        for index, item in enumerate(order)
    ]
    headers = ["", "strategy", "first token", "answer", "battery/day", "a month", "quality", "work", "why"]
    console.table(f"Quality is {found.quality_means}", headers, rows)


def _figures(item: Strategy, currency: str) -> list[str]:
    from trilemma.core.quantity import format_percent, format_quantity, significant

    battery = "—" if item.battery_share_per_day is None else format_percent(item.battery_share_per_day)
    return [
        format_quantity(item.ttft_s, "s"), format_quantity(item.answer_s, "s"), battery,
        f"{significant(item.total_per_month)} {currency}", "—" if item.quality is None else significant(item.quality),
        f"{significant(item.setup_days)} d",
    ]  # fmt: skip


def _why(item: Strategy, found: Advice) -> str:
    if item.failures:
        return "; ".join(f"{failure.constraint}: {failure.text}" for failure in item.failures)
    words = [found.reasons[item.name], *item.notes]
    if item.decided_by:
        words.append(f"{item.decided_by} decides")
    if item.close:
        words.append(f"within the prediction's error of {', '.join(item.close)}: measure it there")
    return "; ".join(words)


def _nearest(swaps: tuple[Swap, ...]) -> tuple[Swap, ...]:
    words = tuple(swap for swap in swaps if swap.direction == "as")
    return tuple(swap for swap in swaps if swap.direction != "as")[:8] + words


def _show_swaps(swaps: tuple[Swap, ...], total: int) -> None:
    from trilemma.cli import console

    if not swaps:
        return
    typer.echo("")
    rows = [[swap.input, _value(swap.now), _edge(swap), swap.becomes or "nothing is feasible"] for swap in swaps]
    more = f"; {total - len(swaps)} more with --all" if total > len(swaps) else ""
    console.table(f"What would change the winner, the nearest first{more}", ["input", "now", "at", "why"], rows)


def _edge(swap: Swap) -> str:
    return _value(swap.threshold) if swap.direction == "as" else f"{swap.direction} {_value(swap.threshold)}"


def _value(value: float | str) -> str:
    from trilemma.core.quantity import significant

    return value if isinstance(value, str) else significant(value)
