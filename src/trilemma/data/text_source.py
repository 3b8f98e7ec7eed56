"""Which texts the user named: a file, the field of its rows, and its share of a mixture, as one string.

`books.txt`, `rows.jsonl#body`, `chat.jsonl:0.3`, `rows.jsonl#body:0.3`. A file that has such a name is that file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trilemma.core.errors import DataError

_FORM = re.compile(r"(?P<path>.+?)(?:#(?P<field>[^#:/]+))?(?::(?P<weight>[-+]?[\d.]+(?:[eE][-+]?\d+)?|[-+]?inf|nan))?")


@dataclass(frozen=True)
class TextSource:
    """A file of text. field: of its JSON rows, None: 'text' or 'messages'; weight: share of calibration windows."""

    path: Path
    field: str | None = None
    weight: float | None = None

    @classmethod
    def parse(cls, given: str | Path) -> TextSource:
        """Read FILE[#FIELD][:WEIGHT].

        Raises:
            DataError: a weight that is not a positive number.
        """
        path = Path(given)
        found = _FORM.fullmatch(str(given))
        if path.exists() or found is None:
            return cls(path)
        weight = found["weight"]
        return cls(Path(found["path"]), found["field"], None if weight is None else _positive(weight, str(given)))


def read_sources(given: str | Path | Sequence[str | Path]) -> list[TextSource]:
    """One source for every string; see `TextSource.parse`."""
    return [TextSource.parse(item) for item in ([given] if isinstance(given, str | Path) else given)]


def weights_of(sources: Sequence[TextSource]) -> tuple[float, ...] | None:
    """Their weights, None where none has one.

    Raises:
        DataError: some have a weight and some have not.
    """
    found = [source.weight for source in sources]
    if all(weight is None for weight in found):
        return None
    for source in sources:
        if source.weight is None:
            raise DataError(
                f"'{source.path}' has no weight, but other files have. Give every file one, such as "
                f"'{source.path}:0.5', or none."
            )
    return tuple(weight for weight in found if weight is not None)


def with_weights(sources: Sequence[TextSource], weights: tuple[float, ...] | None) -> list[TextSource]:
    """The same files with the weights of a recipe that is replayed.

    Raises:
        DataError: another number of files, or other weights given with them.
    """
    given = weights_of(sources)
    if given is not None and given != weights:
        raise DataError(
            f"The recipe was made with {_list(weights)}, not {_list(given)}. Give the files without weights, or "
            "remove 'calibration' from the recipe."
        )
    if weights is not None and len(weights) != len(sources):
        raise DataError(
            f"The recipe was made with {len(weights)} files of text; {len(sources)} were given. Give the same files, "
            "in the same order."
        )
    chosen = weights or (None,) * len(sources)
    return [replace(source, weight=weight) for source, weight in zip(sources, chosen, strict=True)]


def _list(weights: tuple[float, ...] | None) -> str:
    return "no weights" if weights is None else f"the weights {', '.join(f'{item:g}' for item in weights)}"


def _positive(text: str, given: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(f"'{given}' has the weight '{text}'. Give a positive number, such as books.txt:0.7.")
    return weight
