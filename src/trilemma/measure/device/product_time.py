"""Seconds of any matrix product on a profiled host, from the table of those that were timed.

    time(rows, cols) = (a + b rows + c cols + d rows cols) x what the nearest timed shapes deviated from that
    + bytes x extra seconds a byte of a step whose weights do not stay in cache

a..d are fitted for each format and number of tokens; between numbers of tokens and threads and between working sets
the time is interpolated. Formats that were not timed take the nearest one of their width and input precision.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from trilemma.core.host_tables import HostTables, ProductTime

_NEAR = 0.3  # shapes that differ by less than e^0.3 count as the same place


class Kind(NamedTuple):
    """What one fit stands for."""

    format: str
    activation: str
    threads: int
    tokens: int


def fit_positive(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Non-negative costs of features with the least squared relative error."""
    from scipy.optimize import nnls

    rows = np.asarray(features, np.float64) / np.asarray(seconds, np.float64)[:, None]
    scale = np.abs(rows).max(axis=0)
    scale[scale == 0] = 1.0
    return [float(cost) for cost in nnls(rows / scale, np.ones(len(rows)))[0] / scale]


@dataclass(frozen=True)
class ShapeFit:
    """Time by shape, at one kind and the smallest working set."""

    costs: tuple[float, ...]
    places: tuple[tuple[float, float, float], ...]  # log rows, log cols, log (timed / fitted)

    @classmethod
    def of(cls, timed: Sequence[ProductTime]) -> ShapeFit:
        costs = fit_positive([_features(t.rows, t.cols) for t in timed], [t.seconds for t in timed])
        fitted = [float(np.dot(costs, _features(t.rows, t.cols))) for t in timed]
        return cls(
            tuple(costs),
            tuple(
                (math.log(t.rows), math.log(t.cols), math.log(t.seconds / f))
                for t, f in zip(timed, fitted, strict=True)
            ),
        )

    def seconds(self, rows: int, cols: int) -> float:
        fitted = float(np.dot(self.costs, _features(rows, cols)))
        r, c = math.log(rows), math.log(cols)
        weights = [1 / ((r - at) ** 2 + (c - across) ** 2 + _NEAR**2) ** 2 for at, across, _ in self.places]
        deviation = sum(w * off for w, (_, _, off) in zip(weights, self.places, strict=True)) / sum(weights)
        return fitted * math.exp(deviation)


def _features(rows: int, cols: int) -> tuple[float, float, float, float]:
    return (1.0, float(rows), float(cols), float(rows) * cols)


class ProductTimes:
    """Answers `seconds` for any product; built from a profile's tables."""

    def __init__(self, tables: HostTables, bytes_of: Callable[[str, tuple[int, int]], int]) -> None:
        self._rows = tables.products
        self._bytes_of = bytes_of
        self.formats = tuple(dict.fromkeys((row.format, row.activation) for row in tables.products))

    def stand_in(self, format_name: str, activation: str) -> tuple[str, str]:
        """The timed format that stands for this one."""
        if (format_name, activation) in self.formats:
            return format_name, activation
        bits = self._bytes_of(format_name, (1024, 1024))

        def distance(known: tuple[str, str]) -> tuple[bool, bool, float]:
            same_kind = _floating(known[0]) == _floating(format_name)
            return (not same_kind, known[1] != activation, abs(math.log(self._bytes_of(known[0], (1024, 1024)) / bits)))

        return min(self.formats, key=distance)

    def seconds(
        self,
        format_name: str,
        activation: str,
        rows: int,
        cols: int,
        *,
        tokens: float,
        threads: int,
        working_set: float,
    ) -> float:
        """Seconds of one product inside a step that reads `working_set` bytes before it comes here again."""
        known, precision = self.stand_in(format_name, activation)
        size = self._bytes_of(format_name, (rows, cols))

        def at(count: int) -> float:
            kind = Kind(known, precision, threads, count)
            return self._fits[kind].seconds(rows, cols)

        counts = sorted({kind.tokens for kind in self._fits if kind[:3] == (known, precision, threads)})
        cached = between(counts, [at(count) for count in counts], max(tokens, 1.0))
        # Where arithmetic takes longer than memory, waiting hides behind it: the extra was timed with the tokens.
        return max(0.0, cached + size * self._extra(known, precision, threads, tokens, working_set))

    def streamed_s(self, nbytes: float, threads: int, working_set: float) -> float:
        """Extra seconds of reading so many bytes of a cache once, in a step of one token: as unquantized weights."""
        known, precision = self.stand_in("bf16", "bf16")
        return max(0.0, nbytes * self._extra(known, precision, threads, 1, working_set))

    def _extra(self, format_name: str, activation: str, threads: int, tokens: float, working_set: float) -> float:
        curves = self._extras.get((format_name, activation, threads), {})
        if not curves:
            return 0.0
        counts = sorted(curves)
        found = [
            between([math.log(w) for w, _ in curves[n]], [e for _, e in curves[n]], math.log(working_set), flat=True)
            for n in counts
        ]
        return between([math.log(n) for n in counts], found, math.log(max(tokens, 1.0)), flat=True)

    @cached_property
    def _fits(self) -> dict[Kind, ShapeFit]:
        cells: dict[Kind, dict[tuple[int, int], ProductTime]] = defaultdict(dict)
        for row in self._rows:
            kind, shape = Kind(row.format, row.activation, row.threads, row.tokens), (row.rows, row.cols)
            # A larger working set is never quicker: where it was, the smaller one's tries were disturbed.
            if shape not in cells[kind] or row.seconds < cells[kind][shape].seconds:
                cells[kind][shape] = row
        return {kind: ShapeFit.of(list(found.values())) for kind, found in cells.items()}

    @cached_property
    def _extras(self) -> dict[tuple[str, str, int], dict[int, list[tuple[float, float]]]]:
        """(format, activation, threads) -> tokens -> (working set, extra seconds a byte), ascending."""
        by_shape: dict[tuple[Kind, int, int], list[ProductTime]] = defaultdict(list)
        for row in self._rows:
            by_shape[Kind(row.format, row.activation, row.threads, row.tokens), row.rows, row.cols].append(row)
        points: dict[Kind, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for (kind, rows, cols), found in by_shape.items():
            found.sort(key=lambda row: row.working_set_bytes)
            size, least = self._bytes_of(kind.format, (rows, cols)), min(row.seconds for row in found)
            for step, row in enumerate(found if len(found) > 1 else ()):
                points[kind][step].append((row.working_set_bytes, (row.seconds - least) / size))
        curves: dict[tuple[str, str, int], dict[int, list[tuple[float, float]]]] = defaultdict(dict)
        for kind, steps in points.items():
            places = [float(np.median([w for w, _ in found])) for _, found in sorted(steps.items())]
            extras = [float(np.median([e for _, e in found])) for _, found in sorted(steps.items())]
            # A larger working set is never quicker: a point above the later ones was disturbed.
            rising = [min(extras[at:]) for at in range(len(extras))]
            curves[kind[:3]][kind.tokens] = list(zip(places, rising, strict=True))
        return curves


def between(known: Sequence[float], values: Sequence[float], asked: float, *, flat: bool = False) -> float:
    """Linear interpolation over ascending places; beyond the ends along the last piece, or level where `flat`."""
    if len(known) == 1:
        return values[0]
    right = min(max(bisect_left(known, asked), 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    share = (asked - low) / (high - low)
    if flat:
        share = min(max(share, 0.0), 1.0)
    return values[right - 1] * (1 - share) + values[right] * share


def _floating(format_name: str) -> bool:
    return format_name in ("f32", "f16", "bf16")
