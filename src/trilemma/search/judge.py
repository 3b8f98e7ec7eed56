"""What an interval says of a limit: PASS, FAIL or INCONCLUSIVE, and what would settle it.

Pure logic over records: it opens nothing and measures nothing, so a verdict can be recomputed from
report.json. Which candidate to ship is decided in `decide.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.metric import resolve_metric
from trilemma.core.quantity import format_percent, format_quantity
from trilemma.core.trial import Trial
from trilemma.core.verdict import Outcome, Verdict
from trilemma.measure.stats import paired_ratio

QUALITY_METRICS = frozenset(
    {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ppl_increase", "kl_mean", "kl_p99",
     "kl_p999", "top1_agreement"}
)  # fmt: skip
LOOKS_MARGIN, TAKEN_S = "looks_margin", "taken_s"  # conditions of a measurement
EXIT_CODES: dict[Outcome, int] = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}

Interval = tuple[float, float]


def is_quality(metric: str) -> bool:
    """Whether a metric says how good answers are; it is then judged on confirm text alone."""
    return metric in QUALITY_METRICS or metric.startswith(("accuracy/", "accuracy_norm/"))


def verdict(
    limit: Limit,
    measurement: Measurement,
    baseline: Measurement | None = None,
    *,
    accept_estimates: bool = False,
    margin: float = 1.0,
) -> Verdict:
    """PASS when the 95% interval lies inside the limit, FAIL when outside, else INCONCLUSIVE.

    A measurement that is looked at again and again until it settles says so in its conditions
    (`looks_margin`, see `confirm.py`): its interval is widened so that all looks together err in 5%.

    Args:
        limit: the requirement.
        measurement: of the candidate.
        baseline: of the unmodified model; needed by relative limits. When both carry the same number of
            samples from one interleaved run, the interval is that of the paired ratio.
        accept_estimates: let an estimate PASS.
        margin: widens the interval about its value (a cautious search asks for more).
    """
    known = baseline.value if baseline is not None else None
    threshold = limit.value if not limit.relative else None if known is None else limit.value * known
    base = Verdict(
        limit=limit, outcome="INCONCLUSIVE", threshold=threshold, baseline=known, measurement=measurement, reason=""
    )
    margin *= float(measurement.conditions.get(LOOKS_MARGIN, 1.0))
    if measurement.value is None:
        return base.model_copy(update={"reason": f"{limit.metric} is unavailable: {measurement.reason}"})
    if not limit.relative:
        interval = _widen(measurement.value, measurement.interval, margin)
        return _judge(base, measurement.value, interval, limit.value, accept_estimates)
    if baseline is None or not known:
        why = (baseline.reason if baseline else None) or "the unmodified model was not measured here"
        reason = f"'{limit.text}' is relative to the unmodified model: {why}. Give it as an absolute value."
        return base.model_copy(update={"reason": reason})
    ratio, spread = relative(measurement, baseline)
    spread = _widen(ratio, spread, margin)
    judged = _judge(base, ratio, spread, limit.value, accept_estimates)
    return judged.model_copy(update={"relative_value": ratio, "relative_ci95": spread})


def relative(measurement: Measurement, baseline: Measurement) -> tuple[float, Interval | None]:
    """The candidate as a fraction of the baseline, with its 95% interval.

    Paired repetitions (equal numbers of samples) give the median ratio and its interval, in which drift that
    hit both cancels and a spike that hit one hardly counts. Energies that the same power model estimated: see
    `_shared_estimate`. Otherwise the two intervals are divided, the cautious way round.
    """
    assert measurement.value is not None
    assert baseline.value
    ratio = measurement.value / baseline.value
    if measurement == baseline:
        return 1.0, (1.0, 1.0)
    if (bounds := _shared_estimate(measurement, baseline)) is not None:
        return ratio, bounds
    ours, theirs = measurement.samples, baseline.samples
    if len(ours) == len(theirs) >= 3 and min(*ours, *theirs) > 0:
        paired = paired_ratio(theirs, ours)
        return paired.value, paired.ci95
    mine, its = measurement.interval, baseline.interval
    if mine is None or its is None or its[0] <= 0:
        return ratio, None
    return ratio, (mine[0] / its[1], mine[1] / its[0])


def _shared_estimate(measurement: Measurement, baseline: Measurement) -> Interval | None:
    """Bounds of the ratio of two energies from one power model, whatever its constants are.

    Both are sums of a term for time, one for bytes and one for products, each at least 0, with the same
    constants: however those are weighted, the ratio of the sums lies between the least and the greatest ratio
    of the terms. What is uncertain about the constants hits both alike.
    """
    if measurement.source != "estimated" or baseline.source != "estimated":
        return None
    ours, theirs = measurement.conditions, baseline.conditions
    terms = [key for key in ours if key.endswith("_j_per_output_token") and key in theirs]
    if not terms or ours.get("device_class") != theirs.get("device_class"):
        return None
    ratios = [float(ours[key]) / float(theirs[key]) for key in terms if float(theirs[key]) > 0]
    return (min(ratios), max(ratios)) if ratios else None


def slack(found: Verdict) -> float | None:
    """How far inside the limit the value lies, as a fraction of the limit; negative when outside."""
    value = found.relative_value if found.limit.relative else found.measurement.value
    if value is None:
        return None
    scale = abs(found.limit.value) or max(abs(value), 1e-12)
    distance = found.limit.value - value if found.limit.op == "<=" else value - found.limit.value
    return distance / scale


def judge_trial(
    trial: Trial, limits: Sequence[Limit], baseline: Trial, *, accept_estimates: bool = False, margin: float = 1.0
) -> tuple[Verdict, ...]:
    """One verdict per limit; relative limits use the baseline of the same interleaved run where there is one."""
    found = []
    for limit in limits:
        measurement = trial.measurements.get(limit.metric) or Measurement.unavailable(
            limit.metric, "it was not measured in this run"
        )
        against = trial.paired_baseline.get(limit.metric) or baseline.measurements.get(limit.metric)
        found.append(verdict(limit, measurement, against, accept_estimates=accept_estimates, margin=margin))
    return tuple(found)


def worst_miss(verdicts: Sequence[Verdict]) -> float:
    """The largest distance outside a limit, as a fraction of it; negative when all known values are inside."""
    return max((-inside for v in verdicts if (inside := slack(v)) is not None), default=0.0)


def binding(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The limit with the least slack."""
    known = [(inside, index) for index, v in enumerate(verdicts) if (inside := slack(v)) is not None]
    return verdicts[min(known)[1]] if known else None


def outcome_of(verdicts: Sequence[Verdict]) -> Outcome:
    """FAIL when any limit fails, INCONCLUSIVE when any is open, else PASS."""
    outcomes = {found.outcome for found in verdicts}
    return "FAIL" if "FAIL" in outcomes else "INCONCLUSIVE" if "INCONCLUSIVE" in outcomes else "PASS"


def _judge(base: Verdict, value: float, interval: Interval | None, threshold: float, accept_estimates: bool) -> Verdict:
    limit, measurement = base.limit, base.measurement
    shown = _shown(limit, value)
    if interval is None:
        if measurement.source == "estimated" and accept_estimates:
            interval = (value, value)
        else:
            reason = f"{shown} has no interval, so nothing says how sure it is"
            return base.model_copy(update={"reason": reason, "settle": "more repetitions"})
    low, high = interval
    span = shown if low == high else f"{shown} (95% {_shown(limit, low)} to {_shown(limit, high)})"
    noisy = "; the machine was noisy while this was measured" if measurement.noisy else ""
    inside = high <= threshold if limit.op == "<=" else low >= threshold
    outside = low > threshold if limit.op == "<=" else high < threshold
    if inside and measurement.source == "estimated" and not accept_estimates:
        return base.model_copy(
            update={
                "reason": f"{span} lies inside, but it is an estimate",
                "settle": "a measurement, or --accept-estimates to let an estimate pass",
            }
        )
    if inside or outside:
        outcome: Outcome = "PASS" if inside else "FAIL"
        return base.model_copy(
            update={"outcome": outcome, "reason": f"{span} lies {'inside' if inside else 'outside'}{noisy}"}
        )
    settle = _settle(measurement, value, interval, threshold)
    return base.model_copy(update={"reason": f"{span} crosses the limit{noisy}", "settle": settle})


def _settle(measurement: Measurement, value: float, interval: Interval, threshold: float) -> str:
    """How many more samples would pull the interval off the limit, when its width shrinks as 1/sqrt(n)."""
    what = "documents" if is_quality(measurement.metric) else "repetitions"
    n = max(measurement.n, len(measurement.samples), 1)
    distance = abs(threshold - value)
    half = max(interval[1] - value, value - interval[0])
    if distance == 0 or (half / distance) ** 2 > 1000:
        return f"more {what} would hardly settle it: the value lies on the limit; move the limit a little"
    needed = max(1, math.ceil(n * (half / distance) ** 2) - n)
    taken_s = float(measurement.conditions.get(TAKEN_S, 0.0))
    time = f", about {_rounded(taken_s * needed / n)}" if taken_s > 0 else ""
    return f"about {needed} more {what} (it rests on {n} now){time}"


def _rounded(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 120 else f"{round(seconds / 60)} min"


def _widen(value: float, interval: Interval | None, margin: float) -> Interval | None:
    if interval is None or margin == 1.0:
        return interval
    return (value - margin * (value - interval[0]), value + margin * (interval[1] - value))


def _shown(limit: Limit, value: float) -> str:
    if limit.relative:
        return format_percent(value)
    return format_quantity(value, resolve_metric(limit.metric).unit)
