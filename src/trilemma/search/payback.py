"""When building pays: what it cost once against what each output token saves, from the measurements of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from trilemma.core.measurement import Measurement
from trilemma.core.payback import Payback, payback
from trilemma.model.model import Model
from trilemma.search.workbench import Lengths, Workbench

PROMPT_TOKENS, OUTPUT_TOKENS, REPETITIONS = 32, 32, 5
_AXES: tuple[tuple[Literal["energy", "time"], str, str], ...] = (
    ("energy", "build_energy_j", "energy_j_per_output_token"),
    ("time", "build_s", "tpot_s"),
)


def paybacks(
    spent: Mapping[str, Measurement],
    before: Mapping[str, Measurement],
    after: Mapping[str, Measurement],
    what: Literal["build", "search"] = "build",
) -> tuple[Payback, ...]:
    """One record for energy and one for time, as far as all three numbers are known.

    Args:
        spent: with `build_energy_j` and `build_s`.
        before, after: of the unmodified and the new model, best from one interleaved run; with
            `energy_j_per_output_token` and `tpot_s`.

    Returns:
        Records; 'estimated' where any of their numbers is.
    """
    found = []
    for resource, cost_name, metric in _AXES:
        three = (spent.get(cost_name), before.get(metric), after.get(metric))
        numbers = [item.value for item in three if item is not None and item.value is not None]
        if len(numbers) == len(three):
            guessed = any(item is not None and item.source == "estimated" for item in three)
            found.append(payback(resource, *numbers, what=what, source="estimated" if guessed else "measured"))
    return tuple(found)


def time_payback(
    original: Model,
    built: Model,
    spent: Mapping[str, Measurement],
    *,
    runtime: str = "native",
    threads: int | None = None,
) -> tuple[Payback, ...]:
    """Time both models interleaved on this machine, and set the saving against what building took.

    Raises:
        EngineError: the runtime can not open one of them.
    """
    room = min(original.config.max_context, built.config.max_context)
    prompt = min(PROMPT_TOKENS, room // 2)
    lengths = Lengths(
        context=prompt + OUTPUT_TOKENS if room > prompt + OUTPUT_TOKENS else room,
        prompt_tokens=prompt, output_tokens=min(OUTPUT_TOKENS, room - prompt), repetitions=REPETITIONS,
    )  # fmt: skip
    with Workbench(original, lengths, Path(), "", runtime, threads) as bench:  # no text, so nothing is cached
        engine = bench.open(built)
        try:
            ours, theirs = bench.cost(built, engine)
        finally:
            engine.close()
    return paybacks(spent, theirs, ours)


__all__ = ["paybacks", "time_payback"]
