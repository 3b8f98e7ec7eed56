"""The leading candidates timed again side by side, before one is chosen by speed, or by energy estimated from it.

During the search each candidate meets the unmodified model alone, minutes apart from the others. On a
machine that others use too, even the ratio to the unmodified model moves with the load (memory-bound
models suffer more), so the luckiest moment would win. In one interleaved run all have the same moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from trilemma.core.trial import Trial
from trilemma.model.model import Model
from trilemma.runtime.engine import Engine
from trilemma.search.confirm import TIME_METRICS
from trilemma.search.decide import promise
from trilemma.search.explore import Exploration
from trilemma.search.judge import judge_trial

ENERGY_METRICS = ("energy_j_per_output_token", "energy_j_per_total_token", "power_w")
MOST, REPETITIONS = 8, 9
MOST_SHARE = 0.15  # of the whole time
OPEN_S = 0.05  # to open a small artifact that was read a moment ago
LEAST_ROOM_BYTES = 1_000_000_000  # what open candidates may take together, even beside a small model


def plan_run_off(search: Exploration, metric: str) -> None:
    """Have the search keep time back for it."""
    if _speed_decides(search, metric):
        whole = _expected_s([search.baseline] * (MOST + 1))
        search.run_off_s = min(whole, MOST_SHARE * search.deadline.limit_s)


def run_off(search: Exploration, metric: str) -> None:
    """Replace the speeds of the leading trials by those of one run, when speed decides and the time allows."""
    if not _speed_decides(search, metric):
        return
    leaders = _leaders(search, metric)
    while leaders and not search.deadline.allows(_expected_s([*leaders, search.baseline]), reserve_s=search.confirm_s):
        leaders.pop()
    if len(leaders) < 2:
        return
    search.say("run-off", 0, len(leaders), f"the {len(leaders)} leading candidates side by side")
    with ExitStack() as opened:
        engines: dict[str, Engine] = {}
        models: dict[str, Model] = {}
        for trial in leaders:
            models[trial.name] = search.build(trial.recipe)[0]
            engines[trial.name] = search.bench.open(models[trial.name])
            opened.callback(engines[trial.name].close)
        ours, theirs = search.bench.race(engines, REPETITIONS)
        if metric in ENERGY_METRICS:  # estimated from times, so estimated anew from these
            ours = {
                name: found | search.bench.energy(models[name], engines[name], found) for name, found in ours.items()
            }
            theirs = theirs | search.bench.energy(search.model, search.bench.baseline, theirs)
    for place, trial in enumerate(search.trials):
        if trial.status == "measured" and trial.name in ours:
            search.trials[place] = trial.model_copy(
                update={
                    "measurements": trial.measurements | ours[trial.name],
                    "paired_baseline": trial.paired_baseline | theirs,
                }
            )
    search.leaders = tuple(ours)
    search.notes.append(f"speeds of the {len(leaders)} leading candidates are from one run side by side")


def _speed_decides(search: Exploration, metric: str) -> bool:
    """Times decide themselves, and energies that are estimated from them."""
    found = search.baseline.measurements.get(metric)
    return metric in TIME_METRICS or (metric in ENERGY_METRICS and found is not None and found.source == "estimated")


def _leaders(search: Exploration, metric: str) -> list[Trial]:
    """What may still be chosen, the most promising first, as many as fit into memory together."""
    possible = [
        trial
        for trial in search.trials
        if trial.status == "measured" and trial.value(metric) is not None
        if all(found.outcome != "FAIL" for found in judge_trial(trial, search.limits, search.baseline))
    ]
    room = max(search.baseline.value("weights_bytes") or 0.0, LEAST_ROOM_BYTES)
    leaders: list[Trial] = []
    for trial in sorted(possible, key=lambda t: promise(t, metric, search.baseline)):
        room -= trial.value("weights_bytes") or 0.0
        if room >= 0 and len(leaders) < MOST:
            leaders.append(trial)
    return leaders


def _expected_s(trials: Sequence[Trial]) -> float:
    """Seconds of the run, from the times of single requests so far; opening engines included, roughly."""
    requests = [(trial.value("ttft_s") or 0.0, trial.measurements["tpot_s"]) for trial in trials]
    once = sum(ttft + (tpot.value or 0.0) * int(tpot.conditions.get("output_tokens", 1)) for ttft, tpot in requests)
    return 1.2 * (REPETITIONS + 1) * once + OPEN_S * len(trials)
