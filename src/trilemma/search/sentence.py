"""The decision in one sentence: what to ship, what it costs and loses, and which limit binds."""

from __future__ import annotations

from collections.abc import Sequence

from trilemma.core.measurement import Measurement
from trilemma.core.metric import resolve_metric
from trilemma.core.quantity import format_duration, format_percent, format_quantity
from trilemma.core.trial import Trial
from trilemma.core.verdict import Verdict
from trilemma.search.decide import Choice, Objective
from trilemma.search.judge import binding, outcome_of, relative, slack


def ship(trial: Trial, baseline: Trial, verdicts: Sequence[Verdict], objective: Objective) -> str:
    """The sentence when a candidate was chosen and confirmed."""
    outcome = outcome_of(verdicts)
    what = _what(trial, baseline)
    if trial.status == "baseline":
        what = "nothing that was tried beats it"
    failed = [v.limit.text for v in verdicts if v.outcome == "FAIL"]
    open_ = [v for v in verdicts if v.outcome == "INCONCLUSIVE"]
    if outcome == "FAIL":
        return (
            f"Do not ship yet: {trial.name} ({what}) was best on the select text, "
            f"but the confirm run fails {_listed(failed)}."
        )
    if outcome == "INCONCLUSIVE":
        settle = next((f"; to settle it: {v.settle}" for v in open_ if v.settle), "")
        texts = _listed([v.limit.text for v in open_])
        aimed = _aimed(trial, baseline, objective)
        return f"{trial.name} is the best candidate ({what}), but {texts} is not settled{settle}.{aimed}"
    tight = binding(verdicts)
    ending = f"; {_binding(tight)}" if tight is not None else f"; chosen for {objective.text}"
    subject = "the unmodified model" if trial.status == "baseline" else trial.name
    return f"Ship {subject}: {what}{ending}.{_aimed(trial, baseline, objective)}"


def _aimed(trial: Trial, baseline: Trial, objective: Objective) -> str:
    """What was minimised, where the sentence does not show it yet, and whether it is only an estimate."""
    found = trial.measurements.get(objective.metric)
    if found is None or found.value is None or "energy" not in objective.metric:
        return ""
    share = _share(trial, baseline, objective.metric)
    of = f", {format_percent(share)} of the unmodified model's" if share is not None else ""
    text = f" Chosen for {objective.text}: {shown(found)}{of}"
    if found.source == "estimated":
        text += (
            "; this objective was estimated, as no counter was read, so the choice rests on times, bytes and products"
        )
    return f"{text}."


def infeasible(choice: Choice, tried: int) -> str:
    """The sentence when no candidate keeps every limit."""
    if not choice.nearest or choice.blocking is None:
        return "Nothing could be measured, so there is nothing to ship."
    parts = []
    for trial, verdicts in choice.nearest:
        missed = [_miss(v) for v in verdicts if v.outcome == "FAIL"]
        parts.append(f"{trial.name} ({', '.join(missed)})")
    count = f"None of the {tried} candidates keeps" if tried != 1 else "The one candidate does not keep"
    return f"{count} every limit: {choice.blocking.text} blocks. Nearest: {'; '.join(parts)}."


def none_possible(smallest: Trial, blocking: str) -> str:
    """The sentence when arithmetic alone rules every recipe out."""
    return f"No recipe can keep {blocking}: of the smallest, {smallest.name}, {smallest.reason}."


def too_short(given_s: float, needed_s: float, why: str) -> str:
    """The sentence when the time did not suffice for a decision; `why` is a clause with its own subject."""
    return (
        f"The time of {format_duration(given_s)} is too short for a decision: {why}. "
        f"Run it again with --time {needed_s:.0f}s or more; what was measured and built is taken up."
    )


def not_confirmed(trial: Trial, baseline: Trial) -> str:
    """Why too short: the best candidate was found but not confirmed."""
    what = _what(trial, baseline)
    return f"{trial.name} looks best ({what}), but nothing was left to confirm it on text that did not choose it"


def not_all_tried(choice: Choice, tried: int, untried: int) -> str:
    """Why too short: what was tried is not feasible, and more could be tried."""
    blocks = f" ({choice.blocking.text} blocks)" if choice.blocking is not None else ""
    which = f"none of the {tried} candidates" if tried != 1 else "the one candidate"
    keeps = "keeps" if tried != 1 else "does not keep"
    return f"{which} that could be tried {keeps} every limit{blocks}, and {untried} more were not tried"


def _what(trial: Trial, baseline: Trial) -> str:
    """'36% of the bytes, 58% of the time per token, perplexity +1.3%'."""
    parts = []
    if (share := _share(trial, baseline, "weights_bytes")) is not None:
        parts.append(f"{format_percent(share)} of the weight bytes")
    if (share := _share(trial, baseline, "tpot_s")) is not None:
        parts.append(f"{format_percent(share)} of the time per token")
    increase = trial.value("ppl_increase")
    if increase is not None:
        parts.append(f"perplexity {format_percent(increase, signed=True)}")
    return ", ".join(parts) or "measured"


def _share(trial: Trial, baseline: Trial, metric: str) -> float | None:
    measurement = trial.measurements.get(metric)
    against = trial.paired_baseline.get(metric) or baseline.measurements.get(metric)
    if measurement is None or measurement.value is None or against is None or not against.value:
        return None
    return relative(measurement, against)[0]


def _binding(found: Verdict) -> str:
    inside = slack(found)
    room = f" ({format_percent(inside)} of it to spare)" if inside is not None and inside >= 0 else ""
    return f"the limit that binds is {found.limit.text}{room}"


def _miss(found: Verdict) -> str:
    value = shown(found.measurement, found.relative_value)
    inside = slack(found)
    by = f", {format_percent(-inside)} beyond" if inside is not None and inside < 0 else ""
    return f"{found.limit.metric} {value}{by}"


def shown(measurement: Measurement, relative_value: float | None = None) -> str:
    """The value as a fraction of the baseline where the limit is relative, else in its unit."""
    if relative_value is not None:
        return format_percent(relative_value)
    return format_quantity(measurement.value, resolve_metric(measurement.metric).unit)


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}" if texts else "a limit"
