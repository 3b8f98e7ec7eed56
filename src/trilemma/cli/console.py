"""What commands share on the terminal: progress on stderr, one JSON document or a table on stdout.

Numbers are shown with their unit, their interval and a mark when they are estimates.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from trilemma.core.errors import OutputError
from trilemma.core.measurement import Measurement
from trilemma.core.quantity import format_duration, format_quantity, significant

if TYPE_CHECKING:
    from trilemma.search.progress import Progress as SearchProgress

ProgressFunction = Callable[[float, float, str], None]

LINE_EVERY_S = 5.0

stderr = Console(stderr=True, highlight=False)


def print_json(document: object) -> None:
    """One JSON document on stdout, keys in the order given."""
    sys.stdout.write(json_text(document))


def json_text(document: object) -> str:
    """What `print_json` prints: records, dictionaries and lists as indented JSON."""
    return json.dumps(_plain(document), indent=2, ensure_ascii=False) + "\n"


def check_places(plot: Path | None, save: Path | None) -> None:
    """Refuse files that could not be written, before the long work begins.

    Raises:
        OutputError: a folder that is not there, or a plot that is no SVG.
    """
    from trilemma.report.plot import check_plot_path

    check_plot_path(plot)
    if save is not None and not save.parent.is_dir():
        raise OutputError(f"The folder '{save.parent}' does not exist. Make it first, or give another path.")


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
    """A bar with the time left on stderr; yields `update(done, total, what)`.

    Where stderr is no terminal, a line now and then instead.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        task = bars.add_task(title, total=None)
        said = -LINE_EVERY_S

        def update(done: float, total: float, what: str) -> None:
            nonlocal said
            bars.update(task, completed=done, total=total or None, description=what or title)
            if not stderr.is_terminal and time.monotonic() - said >= LINE_EVERY_S:
                said = time.monotonic()
                stderr.print(what or title, markup=False, soft_wrap=True)

        yield update


@contextmanager
def search_progress(title: str) -> Iterator[Callable[[SearchProgress], None]]:
    """The same for a search, which says itself how much time is left."""
    with progress(title) as update:

        def listen(state: SearchProgress) -> None:
            left = "" if state.left_s is None else f" (at most {format_duration(state.left_s)} left)"
            update(state.done, state.total, f"{state.stage}: {state.message}{left}")

        yield listen


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, its title above it; the first column and a last one called 'why' are text."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        shown.add_column(header, justify="left" if index == 0 or header == "why" else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    width = None if sys.stdout.isatty() else 180
    out = Console(file=sys.stdout, highlight=False, markup=False, width=width)
    if title:
        out.print(title, style="bold", soft_wrap=True)
    out.print(shown)


def show(measurement: Measurement | None) -> str:
    """'12.3 ms [12.1, 12.6]'; '~' before an estimate, '!' after a noisy run, a dash when unavailable."""
    if measurement is None or measurement.value is None:
        return "—"
    value = _quantity(measurement.metric, measurement.value, measurement.unit)
    mark = "~" if measurement.source == "estimated" else ""
    return f"{mark}{value}{_interval(measurement)}{' !' if measurement.noisy else ''}"


def _interval(measurement: Measurement) -> str:
    if measurement.ci95 is None or measurement.unit == "bytes":
        return ""
    edges = [_quantity(measurement.metric, edge, measurement.unit) for edge in measurement.ci95]
    unit = _quantity(measurement.metric, measurement.value or 0.0, measurement.unit).partition(" ")[2]
    if unit and all(edge.endswith(f" {unit}") for edge in edges):
        edges = [edge.removesuffix(f" {unit}") for edge in edges]
    return f" [{', '.join(edges)}]"


def _quantity(metric: str, value: float, unit: str) -> str:
    # perplexity is a bare number, not a share that reads as per cent
    return significant(value) if metric.endswith("perplexity") else format_quantity(value, unit)
