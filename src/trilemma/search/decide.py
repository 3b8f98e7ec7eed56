"""Which candidate to ship, from the verdicts of `judge.py`.

Pure logic over records: it opens nothing and measures nothing, so a decision can be recomputed from
report.json. The words for people are in `sentence.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from trilemma.core.errors import LimitError, UnknownNameError
from trilemma.core.limit import Limit
from trilemma.core.metric import METRICS, resolve_metric
from trilemma.core.trial import Trial
from trilemma.core.verdict import Verdict
from trilemma.search.judge import is_quality, judge_trial, relative, verdict, worst_miss

DEFAULT_QUALITY_LIMIT = "ppl_increase<=1%"
# On the select text an interval must lie inside twice as wide: the confirm interval, drawn anew, is then inside too.
SELECT_MARGIN = 2.0
# Speeds that differ by less than this are one speed when their intervals overlap; quality then decides.
SPEED_TIE = 0.03
_CODE_CHOOSERS = frozenset({"rtn", "hqq", "gptq", "gptaq", "sign-rounding"})
_CODE_SETTINGS = frozenset({
    "scale", "damping", "block", "activation_order", "pull", "drift", "refits", "guided", "rows", "power", "strength",
    "growth", "steps", "fit", "batch_size", "learning_rate", "ranges", "start",
})  # fmt: skip
_COSTS_NOTHING = frozenset({"smooth", "awq", "rotate", "tune-norms", "tune-scales"})  # other values in the same places


@dataclass(frozen=True)
class Objective:
    """What is best among those that keep every limit. `implied` are limits that the user did not write."""

    metric: str
    because: str
    implied: tuple[Limit, ...] = ()

    @property
    def text(self) -> str:
        least = "least" if resolve_metric(self.metric).direction == "lower" else "most"
        extra = f" with {', '.join(limit.text for limit in self.implied)}" if self.implied else ""
        return f"{least} {self.metric}{extra}"


def objective_for(limits: Sequence[Limit], minimize: str | None = None) -> Objective:
    """The objective when the user names none: see MEASUREMENT "What an optimisation does by default".

    No limits: least tpot with ppl_increase<=1%. Limits without a quality limit: least kl_mean. With a
    quality limit: least tpot, as quality is looked after.

    Raises:
        LimitError: `minimize` is no metric.
    """
    quality_limited = any(is_quality(limit.metric) for limit in limits)
    implied = () if limits else (Limit.parse(DEFAULT_QUALITY_LIMIT),)
    if minimize is not None:
        try:
            metric = resolve_metric(minimize).name
        except UnknownNameError as error:
            raise LimitError(f"Can not minimise '{minimize}': {error}") from None
        if metric not in METRICS:
            raise LimitError(f"Can not minimise '{minimize}': it is not measured by the search.")
        return Objective(metric, "you asked for it", () if is_quality(metric) else implied)
    if not limits:
        return Objective("tpot_s", "no limits were given", implied)
    if quality_limited:
        return Objective("tpot_s", "the limits look after quality, so speed decides")
    return Objective("kl_mean", "the limits look after cost, so quality decides")


@dataclass(frozen=True)
class Choice:
    """The outcome of choosing on the select text.

    status: 'feasible' (every interval inside), 'undecided' (none outside, some cross) or 'infeasible'.
    """

    status: Literal["feasible", "undecided", "infeasible"]
    trial: Trial | None
    verdicts: tuple[Verdict, ...]
    blocking: Limit | None = None
    nearest: tuple[tuple[Trial, tuple[Verdict, ...]], ...] = ()
    alternatives: dict[str, str] = field(default_factory=dict)


def choose(
    trials: Sequence[Trial],
    limits: Sequence[Limit],
    objective: Objective,
    baseline: Trial,
    *,
    accept_estimates: bool = False,
) -> Choice:
    """The best trial among those whose intervals lie inside every limit (implied ones too)."""
    every = (*limits, *objective.implied)
    usable = [trial for trial in trials if trial.status in ("measured", "baseline")]

    def judged(margin: float) -> dict[str, tuple[Verdict, ...]]:
        return {
            trial.name: judge_trial(trial, every, baseline, accept_estimates=accept_estimates, margin=margin)
            for trial in usable
        }

    plain = judged(1.0)
    for verdicts in (judged(SELECT_MARGIN), plain):
        feasible = [t for t in usable if all(v.outcome == "PASS" for v in verdicts[t.name])]
        best = best_of(feasible, objective.metric, baseline)
        if best is not None:
            named = alternatives(feasible, baseline)
            return Choice("feasible", best, plain[best.name], nearest=(), alternatives=named)
    nearest = sorted(usable, key=lambda t: worst_miss(plain[t.name]))
    undecided = [t for t in usable if not any(v.outcome == "FAIL" for v in plain[t.name])]
    near = tuple((t, plain[t.name]) for t in nearest[:3])
    if undecided:
        inside = [t for t in undecided if worst_miss(plain[t.name]) <= 0]
        best = best_of(inside, objective.metric, baseline) or min(undecided, key=lambda t: worst_miss(plain[t.name]))
        return Choice("undecided", best, plain[best.name], nearest=near)
    blocking = _blocking(usable, plain, every)
    return Choice("infeasible", None, plain[nearest[0].name] if nearest else (), blocking=blocking, nearest=near)


def best_of(trials: Sequence[Trial], metric: str, baseline: Trial) -> Trial | None:
    """The best by one metric; speeds that noise can not tell apart are decided by kl_mean."""
    known = [t for t in trials if t.value(metric) is not None]
    if not known:
        return None
    scored = {t.name: _score(t, metric, baseline) for t in known}
    best = min(known, key=lambda t: scored[t.name][0])
    if is_quality(metric) or resolve_metric(metric).unit == "bytes":
        return best
    point, high = scored[best.name][0], scored[best.name][2]
    equal = [t for t in known if scored[t.name][1] <= high and scored[t.name][0] <= point * (1 + SPEED_TIE)]
    forms = {_form(t) for t in equal}
    return min((t for t in known if _form(t) in forms), key=lambda t: _or_inf(t.value("kl_mean")))


def _form(trial: Trial) -> str:
    """What decides a trial's cost: formats, activations and cache, not which codes were chosen.

    Recipes that differ in nothing else run the same kernels over the same bytes; a measured difference between
    them is noise.
    """
    steps = [
        ("codes" if step.technique in _CODE_CHOOSERS else step.technique,
         {name: value for name, value in step.settings.items() if name not in _CODE_SETTINGS})
        for step in trial.recipe.steps if step.technique not in _COSTS_NOTHING or step.settings.get("tied") == "untie"
    ]  # fmt: skip
    return json.dumps(steps, sort_keys=True)


def _score(trial: Trial, metric: str, baseline: Trial) -> tuple[float, float, float]:
    """(value, low, high), lower is better, relative to the baseline of the same run where possible."""
    measurement = trial.measurements[metric]
    against = trial.paired_baseline.get(metric) or baseline.measurements.get(metric)
    assert measurement.value is not None
    value, interval = measurement.value, measurement.interval
    if against is not None and against.value:
        value, interval = relative(measurement, against)
    low, high = interval or (value, value)
    if resolve_metric(metric).direction == "higher":
        return 1 / max(value, 1e-300), 1 / max(high, 1e-300), 1 / max(low, 1e-300)
    return value, low, high


def promise(trial: Trial, metric: str, baseline: Trial) -> float:
    """How good a trial may be at most, lower is better: its interval's near end, relative to the baseline's.

    An estimate's interval is no noise of its own but the power model's doubt, so its value stands for it.
    """
    value, low, _ = _score(trial, metric, baseline)
    return value if trial.measurements[metric].source == "estimated" else low


def alternatives(feasible: Sequence[Trial], baseline: Trial) -> dict[str, str]:
    """Names of the smallest, the balanced and the safest of the feasible trials."""
    changed = [t for t in feasible if t.status != "baseline"]
    if not changed:
        return {}
    smallest = min(changed, key=lambda t: (_or_inf(t.value("weights_bytes")), _or_inf(t.value("kl_mean"))))
    safest = min(changed, key=lambda t: _or_inf(t.value("kl_mean")))
    return {"smallest": smallest.name, "balanced": _balanced(changed, baseline).name, "safest": safest.name}


def _balanced(trials: Sequence[Trial], baseline: Trial) -> Trial:
    """Nearest to the ideal corner (fewest bytes, least time, least log KL), each axis scaled to its range."""
    axes = []
    for metric in ("weights_bytes", "tpot_s", "kl_mean"):
        values = [math.log(max(_or_inf(t.value(metric)), 1e-12)) for t in trials]
        finite = [v for v in values if math.isfinite(v)]
        if not finite:
            continue
        low, span = min(finite), (max(finite) - min(finite)) or 1.0
        axes.append([(v - low) / span if math.isfinite(v) else 1.0 for v in values])
    distance = [math.hypot(*point) for point in zip(*axes, strict=True)] or [0.0] * len(trials)
    return trials[min(range(len(trials)), key=distance.__getitem__)]


def _blocking(
    trials: Sequence[Trial], verdicts: dict[str, tuple[Verdict, ...]], limits: Sequence[Limit]
) -> Limit | None:
    """The limit without which most trials would be left; between equals, the one that misses by most."""
    if not trials or not limits:
        return None

    def freed(index: int) -> tuple[int, float]:
        rest = [[v for i, v in enumerate(verdicts[t.name]) if i != index] for t in trials]
        left = sum(all(v.outcome != "FAIL" for v in others) for others in rest)
        least = min(worst_miss([verdicts[t.name][index]]) for t in trials)
        return left, least

    return limits[max(range(len(limits)), key=freed)]


def _or_inf(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


__all__ = ["Choice", "Objective", "alternatives", "best_of", "choose", "objective_for", "promise", "verdict"]
