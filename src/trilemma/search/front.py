"""Which candidates nobody beats: the Pareto front over mixed directions. Only numbers, whatever they mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Direction = Literal["lower", "higher"]


def pareto_front(points: Sequence[Sequence[float | None]], directions: Sequence[Direction]) -> list[int]:
    """Indices of the points that no other point dominates, in their given order.

    A point dominates another when it is at least as good everywhere and better somewhere, so equal
    points stay together. A point with an unknown (None or NaN) coordinate can not be compared: it is
    neither on the front nor does it push anything off.

    Raises:
        ValueError: a point with another number of coordinates than there are directions.
    """
    for point in points:
        if len(point) != len(directions):
            raise ValueError(f"a point has {len(point)} coordinates, but there are {len(directions)} directions")
    signs = [1.0 if direction == "lower" else -1.0 for direction in directions]
    known = {
        index: tuple(sign * value for sign, value in zip(signs, point, strict=True) if value is not None)
        for index, point in enumerate(points)
        if all(value is not None and not math.isnan(value) for value in point)
    }
    return [i for i, mine in known.items() if not any(_dominates(other, mine) for other in known.values())]


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """One is nowhere worse and somewhere better; lower is better in every coordinate."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
