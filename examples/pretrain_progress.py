"""The progress bar of `pretrain.py` and its parts, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

console = Console(stderr=True)


@contextmanager
def bar_to_one(what: str) -> Iterator[tuple[Progress, TaskID]]:
    """A bar from 0 to 1; give its parts to `update(task, completed=..., description=...)`."""
    with Progress(TextColumn("{task.description}"), BarColumn(), console=console) as progress:
        yield progress, progress.add_task(what, total=1.0)
