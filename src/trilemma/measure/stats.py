"""95% intervals: over documents for quality, over repetitions for time.

Quality figures are ratios of sums over documents (nats over tokens). Documents differ in length and
difficulty, so the document is what is resampled. Of the percentile, BCa, expanded percentile,
Student-t, percentile-t and symmetric percentile-t intervals, the last (Hall 1988, "On symmetric
bootstrap confidence intervals", JRSS B 50) covers best at 5-40 documents, on the logarithm for
positive quantities. In 1,000 simulated repetitions at 10, 20 and 40 documents of unequal length the
95% interval held the truth in 96.2, 95.2, 94.5% (nats), 96.0, 94.6, 95.4% (paired differences with
t5 tails) and 93.8, 94.1, 93.6% (KL, lognormal 0.5 between documents); where KL differs between
documents by lognormal 1.0 it is 90-92%, so many documents matter most there. The 99.9% quantile of
KL held in 88, 91 and 94%.
Left out: tests of hypotheses. A verdict asks where the interval lies, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
Scale = Literal["linear", "log"]

RESAMPLES = 10_000
LEAST_FOR_BOOTSTRAP = 5  # with fewer documents a resample is too often one document only
_CHUNK_CELLS = 4_000_000


class Interval(NamedTuple):
    """A value and its 95% interval; `low` and `high` are None where nothing can be said."""

    value: float
    low: float | None
    high: float | None

    @property
    def ci95(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


def ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    scale: Scale = "linear",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Sum of numerators over sum of denominators, with a symmetric percentile-t interval over documents.

    Args:
        numerators: (documents,) for example summed KL.
        denominators: (documents,) for example tokens.
        scale: 'log' for positive quantities (the interval is symmetric in the logarithm).
        resamples, seed: of the bootstrap.

    One document gives no interval; two to four get Student's t instead of the bootstrap.
    """
    num, den = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if num.shape != den.shape or num.ndim != 1 or num.size == 0:
        raise ValueError(f"expected two vectors of one length, got {num.shape} and {den.shape}")
    value = float(num.sum() / den.sum())
    if num.size < 2:
        return Interval(value, None, None)
    logarithmic = scale == "log" and value > 0 and bool((num >= 0).all())
    error = _ratio_error(num, den, value)
    if error == 0.0:
        return Interval(value, value, value)
    if num.size < LEAST_FOR_BOOTSTRAP:
        width = student_t_975(num.size - 1)
    else:
        width = _studentized_width(num, den, value, logarithmic, resamples, seed)
    if logarithmic:
        spread = float(np.exp(width * error / value))
        return Interval(value, value / spread, value * spread)
    return Interval(value, value - width * error, value + width * error)


def quantile_interval(values: ArrayLike, documents: ArrayLike, q: float, *, seed: int = 0) -> Interval:
    """A quantile of pooled token values with an interval over documents.

    Woodruff 1952 (JASA 47): the interval of the share above the quantile, read back through the
    empirical quantile function. The upper end can not exceed the largest value seen.
    """
    data, owners = np.asarray(values, np.float64), np.asarray(documents)
    ordered = np.sort(data)
    value = float(ordered[min(len(ordered) - 1, int(np.ceil(q * len(ordered))) - 1)])
    names, index = np.unique(owners, return_inverse=True)
    above = np.bincount(index, weights=data > value, minlength=len(names))
    counts = np.bincount(index, minlength=len(names)).astype(np.float64)
    if above.sum() == 0:
        return Interval(value, None, None)
    share = ratio_interval(above, counts, scale="log", seed=seed)
    if share.low is None or share.high is None:
        return Interval(value, None, None)
    low = float(np.quantile(ordered, max(0.0, 1 - share.high), method="inverted_cdf"))
    high = float(np.quantile(ordered, max(0.0, 1 - share.low), method="inverted_cdf"))
    return Interval(value, min(low, value), max(high, value))


def median_interval(samples: ArrayLike) -> Interval:
    """The median of repeated timings.

    From six samples on, the interval is two order statistics (exact for any distribution, at least
    95%); with two to five it is Student's t on the logarithms, or on the values where one is not positive.
    """
    data = np.sort(np.asarray(samples, np.float64))
    if data.size == 0:
        raise ValueError("no samples")
    value = float(np.median(data))
    if data.size < 2:
        return Interval(value, None, None)
    if data.size >= 6:
        rank = _order_rank(data.size)
        return Interval(value, float(data[rank]), float(data[data.size - 1 - rank]))
    logarithmic = bool(data[0] > 0)
    scaled = np.log(data) if logarithmic else data
    centre, half = _student(scaled)
    low, high = centre - half, centre + half
    if logarithmic:
        low, high = float(np.exp(low)), float(np.exp(high))
    return Interval(value, min(low, value), max(high, value))


def mean_interval(samples: ArrayLike) -> Interval:
    """The mean of repeated figures with Student's t interval."""
    data = np.asarray(samples, np.float64)
    if data.size < 2:
        return Interval(float(data.mean()), None, None)
    centre, half = _student(data)
    return Interval(centre, centre - half, centre + half)


def paired_ratio(baseline: Sequence[float], candidate: Sequence[float]) -> Interval:
    """Median of candidate / baseline, repetition by repetition: drift that hits both drops out.

    Raises:
        ValueError: different numbers of samples, or a baseline of 0.
    """
    if len(baseline) != len(candidate):
        raise ValueError(f"{len(baseline)} baseline and {len(candidate)} candidate samples can not be paired")
    if min(baseline) <= 0:
        raise ValueError("a baseline sample is not positive")
    return median_interval(np.asarray(candidate, np.float64) / np.asarray(baseline, np.float64))


def share_interval(hits: ArrayLike, counts: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """A share in [0, 1] over documents; when all or none hit, the exact binomial bound on tokens."""
    yes, all_ = np.asarray(hits, np.float64), np.asarray(counts, np.float64)
    found = ratio_interval(yes, all_, resamples=resamples, seed=seed)
    slack = -np.log(0.025) / all_.sum()
    if found.value in (0.0, 1.0):
        low, high = (0.0, float(min(1, slack))) if found.value == 0.0 else (float(max(0, 1 - slack)), 1.0)
        return Interval(found.value, low, high)
    if found.low is None or found.high is None:
        return found
    return Interval(found.value, max(0.0, found.low), min(1.0, found.high))


def _ratio_error(num: Float64, den: Float64, value: float) -> float:
    """Linearised standard error of a ratio of sums over independent documents."""
    n = num.size
    squares = float(np.sum((num - value * den) ** 2))
    # Differences at the level of rounding are no variation.
    if squares <= n * (1e-14 * float(np.max(np.abs(num), initial=0.0))) ** 2:
        return 0.0
    return float(np.sqrt(n / (n - 1) * squares) / den.sum())


def _studentized_width(num: Float64, den: Float64, value: float, logarithmic: bool, resamples: int, seed: int) -> float:
    """The 95% quantile of |t| over resampled documents."""
    n = num.size
    rng = np.random.default_rng(seed)
    columns = np.stack([num, den, num * num, num * den, den * den], axis=1)  # (documents, 5)
    chunk = max(1, min(resamples, _CHUNK_CELLS // n))
    found = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)  # (resamples, documents)
        s_num, s_den, s_nn, s_nd, s_dd = (weights @ columns).T
        ratio = s_num / s_den
        squares = np.maximum(s_nn - 2 * ratio * s_nd + ratio**2 * s_dd, 0.0)
        error = np.sqrt(n / (n - 1) * squares) / s_den
        with np.errstate(divide="ignore", invalid="ignore"):
            difference, unit = (np.log(ratio / value), ratio) if logarithmic else (ratio - value, np.float64(1.0))
            t = np.abs(difference) * unit / error
        found.append(np.where(np.isnan(t), np.inf, t))
    width = float(np.quantile(np.concatenate(found), 0.95, method="lower"))
    return width if np.isfinite(width) else student_t_975(1)


def _student(data: Float64) -> tuple[float, float]:
    half = student_t_975(data.size - 1) * float(data.std(ddof=1)) / float(np.sqrt(data.size))
    return float(data.mean()), half


def _order_rank(n: int) -> int:
    """The largest rank r so that [x_r, x_(n-1-r)] covers the median in at least 95% of cases."""
    from scipy.stats import binom

    return max(0, int(binom.ppf(0.025, n, 0.5)) - 1)


def student_t_975(degrees: int) -> float:
    """The 97.5% quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))
