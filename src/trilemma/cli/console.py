"""What commands share on the terminal: progress on stderr, one JSON document or a table on stdout.

Numbers are shown with their unit, their interval and a mark when they are estimates.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from trilemma.core.measurement import Measurement

ProgressFunction = Callable[[float, float, str], None]

stderr = Console(stderr=True, highlight=False)


def print_json(document: object) -> None:
    """One JSON document on stdout, keys in the order given."""
    sys.stdout.write(json.dumps(_plain(document), indent=2, ensure_ascii=False) + "\n")


def _plain(document: Any) -> Any:
    if hasattr(document, "model_dump"):
        return document.model_dump(mode="json")
    if isinstance(document, dict):
        return {str(key): _plain(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_plain(value) for value in document]
    return document


@contextmanager
def progress(title: str) -> Iterator[ProgressFunction]:
    """A bar with the time left on stderr; yields `update(done, total, what)`. Silent lines when not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        task = bars.add_task(title, total=None)
        last = ""

        def update(done: float, total: float, what: str) -> None:
            nonlocal last
            bars.update(task, completed=done, total=total, description=what or title)
            if not stderr.is_terminal and what != last:
                stderr.print(what, markup=False)
            last = what

        yield update


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout."""
    shown = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        shown.add_column(header, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    out = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=False, width=None if sys.stdout.isatty() else 160)
    out.print(shown)


def show(measurement: Measurement | None) -> str:
    """'12.3 ms [12.1, 12.6]'; '~' before an estimate, '!' after a noisy run, '-' when unavailable."""
    if measurement is None or measurement.value is None:
        return "-"
    low_high = ""
    if measurement.ci95 is not None and measurement.unit != "bytes":
        low, high = (quantity(edge, measurement.unit).split(" ")[0] for edge in measurement.ci95)
        low_high = f" [{low}, {high}]"
    mark = "~" if measurement.source == "estimated" else ""
    return f"{mark}{quantity(measurement.value, measurement.unit)}{low_high}{'!' if measurement.noisy else ''}"


_SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "us")),
    "J": ((1, "J"), (1e-3, "mJ"), (1e-6, "uJ")),
}


def quantity(value: float, unit: str) -> str:
    """A number in the unit that suits its size."""
    for factor, name in _SCALES.get(unit, ()):
        if abs(value) >= factor or (factor, name) == _SCALES[unit][-1]:
            return f"{value / factor:.3g} {name}" if abs(value / factor) < 1000 else f"{value / factor:.0f} {name}"
    digits = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return digits if unit == "ratio" else f"{digits} {unit}"
