"""What would change the ranking: each number of a scenario is moved until another strategy wins.

A number is moved away in steps of 5% at first and of doublings in the end, up to a factor of 1,024 either
way; where the winner changes between two tries, the threshold is found by bisection. One input moves at
a time. Choices that are no numbers (where data may go, what is preferred, which devices are served, which
runtimes are at hand) are tried one by one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import ValidationError

from trilemma.core.advice import Swap
from trilemma.core.errors import InputError
from trilemma.search.strategies.advise import winner
from trilemma.search.strategies.scenario import Preference, Reach, Scenario, numbers

FACTORS = (1.05, 1.1, 1.25, 1.5, 2, 3, 4, 6, *(2.0**power for power in range(3, 11)))
_STEPS = 40
_WHOLE = ("prompt_tokens", "output_tokens", "batch")
_SKIPPED = ("version", "equal_within", "devices", "basis")  # shares of devices are tried whole
_TOGETHER = "workload.requests_per_day"
_INVALID = object()


def find_swaps(scenario: Scenario, now: str | None) -> tuple[tuple[Swap, ...], tuple[str, ...]]:
    """Inputs that can change the winner, the nearest threshold first, and those that can not within the range."""
    data = scenario.model_dump()
    swaps: list[Swap] = []
    steady: list[str] = []
    for path, value in _inputs(data):
        found = [swap for up in (True, False) if (swap := _threshold(data, path, value, up, now)) is not None]
        swaps += found
        if not found:
            steady.append(readable(data, path))
    swaps.sort(key=_distance)
    return (*swaps, *_choices(scenario, now)), tuple(steady)


def with_number(data: dict[str, Any], path: str, value: float) -> Scenario:
    """The scenario with one number changed. Raises InputError for a value that can not be."""
    changed = copy.deepcopy(data)
    place: Any = changed
    *parents, leaf = path.split(".")
    for key in parents:
        place = place[int(key)] if isinstance(place, list | tuple) else place[key]
    if path == _TOGETHER:
        place["peak_requests_per_s"] *= value / place[leaf]  # a busier service is busier in the same minutes
    place[leaf] = round(value) if leaf in _WHOLE else value
    try:
        return Scenario.model_validate(changed)
    except ValidationError as error:
        raise InputError(str(error)) from None


def readable(data: dict[str, Any], path: str) -> str:
    """'candidates.0.quality' -> "quality of 'small model'"."""
    parts = path.split(".")
    if parts[0] in ("candidates", "cascades"):
        name = data[parts[0]][int(parts[1])]["name"]
        inner = ["batch " + str(data[parts[0]][int(parts[1])]["serving"]["steps"][int(parts[4])]["batch"]), "step_s"] \
            if parts[2:4] == ["serving", "steps"] else parts[2:]  # fmt: skip
        return f"{' '.join(inner)} of '{name}'"
    return " ".join(parts) + (" (the peak with it)" if path == _TOGETHER else "")


def _inputs(data: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for path, value in numbers(data):
        if path.split(".")[0] not in _SKIPPED and not path.endswith(".batch") and value > 0:
            yield path, value


def _winner(data: dict[str, Any], path: str, value: float) -> object:
    try:
        return winner(with_number(data, path, value))
    except InputError:
        return _INVALID  # outside what the number can be, or what the model's context holds


def _threshold(data: dict[str, Any], path: str, value: float, up: bool, now: str | None) -> Swap | None:
    """Where the winner changes when this number grows (or shrinks)."""
    inside = value
    for factor in FACTORS:
        outside = value * factor if up else value / factor
        found = _winner(data, path, outside)
        if found is _INVALID:
            outside = _last_valid(data, path, inside, outside)
            found = _winner(data, path, outside)
            if found == now or found is _INVALID:
                return None
        if found != now:
            edge, becomes = _bisect(data, path, inside, outside, now)
            return Swap(
                input=readable(data, path), now=value, threshold=edge, direction="above" if up else "below",
                becomes=becomes,
            )  # fmt: skip
        inside = outside
    return None


def _last_valid(data: dict[str, Any], path: str, valid: float, invalid: float) -> float:
    for _ in range(_STEPS):
        middle = (valid + invalid) / 2
        if _winner(data, path, middle) is _INVALID:
            invalid = middle
        else:
            valid = middle
    return valid


def _bisect(
    data: dict[str, Any], path: str, inside: float, outside: float, now: str | None
) -> tuple[float, str | None]:
    """Between a value at which the winner holds and one at which it does not; the first value that does not."""
    whole = path.split(".")[-1] in _WHOLE
    for _ in range(_STEPS):
        middle = math.sqrt(inside * outside)
        if whole:
            middle = round(middle)
            if middle in (inside, outside):
                break
        if _winner(data, path, middle) == now:
            inside = middle
        else:
            outside = middle
        if abs(outside / inside - 1) < 1e-9:
            break
    becomes = _winner(data, path, outside)
    return outside, becomes if isinstance(becomes, str) else None


def _distance(swap: Swap) -> float:
    assert isinstance(swap.now, float)
    assert isinstance(swap.threshold, float | int)
    return abs(math.log(swap.threshold / swap.now))


def _choices(scenario: Scenario, now: str | None) -> Iterator[Swap]:
    """Choices that are no numbers and that another winner follows from."""
    for reach in get_args(Reach):
        yield from _choice(scenario, {"data_may_go": reach}, "data_may_go", scenario.data_may_go, reach, now)
    offline = not scenario.workload.offline
    yield from _choice(
        scenario, {"workload": scenario.workload.model_copy(update={"offline": offline})}, "workload offline",
        str(scenario.workload.offline).lower(), str(offline).lower(), now,
    )  # fmt: skip
    for preference in get_args(Preference):
        yield from _choice(scenario, {"prefer": preference}, "prefer", scenario.prefer, preference, now)
    for device in scenario.devices if len(scenario.devices) > 1 else ():
        others = tuple(item for item in scenario.devices if item is not device)
        served = f"served ({device.share:.0%} of the customers)"
        yield from _choice(scenario, {"devices": others}, f"device '{device.label}'", served, "not served", now)
    for runtime in dict.fromkeys(item.runtime for item in scenario.candidates if item.runtime):
        has = runtime in scenario.team.runtimes
        kept = tuple(item for item in scenario.team.runtimes if item != runtime) + (() if has else (runtime,))
        team = scenario.team.model_copy(update={"runtimes": kept})
        words = ("at hand", "not at hand")
        yield from _choice(scenario, {"team": team}, f"runtime '{runtime}'", words[not has], words[has], now)


def _choice(
    scenario: Scenario, update: dict[str, Any], name: str, was: str, becomes: str, now: str | None
) -> Iterator[Swap]:
    if was == becomes:
        return
    found = winner(scenario.model_copy(update=update))
    if found != now:
        yield Swap(input=name, now=was, threshold=becomes, direction="as", becomes=found)
