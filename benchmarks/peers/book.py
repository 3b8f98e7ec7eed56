"""Everything that was measured, one JSON object a line, also in a file that a later run carries on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_CASE = ("shape", "format", "kv", "threads", "engine", "cell", "round")


@dataclass
class Book:
    """All rows so far; with a path, those that the file has already, and new ones are appended to it."""

    path: Path | None = None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            self.rows += read_rows([self.path])
        self._done = {_case(row) for row in self.rows if row["record"] == "run"}

    def add(self, record: str, **about: Any) -> None:
        row = {"record": record, **about, "at": time.time()}
        self.rows.append(row)
        if record == "run":
            self._done.add(_case(row))
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")

    def has_run(self, **about: Any) -> bool:
        """Whether this cell of this engine was measured in this round."""
        return _case(about) in self._done

    def trials(self, **about: Any) -> list[Row]:
        """Trials of an earlier run."""
        wanted = [row for row in self.rows if row["record"] == "trial"]
        return [row for row in wanted if all(row.get(name) == value for name, value in about.items())]

    def seconds(self, **about: Any) -> float:
        """How long a process of the same kind took the last time; 0 where that is not known."""
        found = [row["seconds"] for row in self.rows if row["record"] == "run" and "seconds" in row
                 and all(row.get(name) == value for name, value in about.items())]  # fmt: skip
        return float(found[-1]) if found else 0.0


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of several files; rounds of different files stay different, since they were not interleaved."""
    found: list[Row] = []
    for number, path in enumerate(paths):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if number and row.get("round") is not None:
                row["round"] += 1000 * number
            found.append(row)
    return found


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _CASE)


__all__ = ["Book", "Row", "read_rows"]
