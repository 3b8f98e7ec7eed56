"""95% intervals: over documents for quality, over repetitions for time.

Quality figures are ratios of sums over documents (nats over tokens). Documents differ in length and
difficulty, so the document is what is resampled. Differences get the symmetric percentile-t interval
(Hall 1988, "On symmetric bootstrap confidence intervals", JRSS B 50); positive quantities one on the
logarithm, from resampled documents that are varied by as much as documents differ; shares Wilson's;
medians interpolated order statistics. How often each holds a known truth at 5 to 80 documents is
measured by benchmarks/coverage.py and stated in docs/concepts/verdicts.md; what else was tried is in
docs/log.md.
Left out: tests of hypotheses. A verdict asks where the interval lies, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
Scale = Literal["linear", "log"]

RESAMPLES = 4_000
LEAST_FOR_BOOTSTRAP = 5  # with fewer documents a resample is too often one document only
_COMMON_TOKENS, _COMMON_SHARE = 5, 0.05  # where documents' shares of large values are compared
_TAIL_VALUES = 30
_BEYOND_FIVE = 1.08  # times the way from the median of five to their ends: 95% for normal noise
_CHUNK_CELLS = 1_000_000
_PLAIN_CELLS, _SMOOTHED_CELLS, _LEAST_RESAMPLES = 320_000, 160_000, 500  # so that an interval takes milliseconds


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
    """Sum of numerators over sum of denominators, with a percentile-t interval over documents.

    Args:
        numerators: (documents,) for example summed KL.
        denominators: (documents,) for example tokens.
        scale: 'log' for positive quantities: t is taken of the logarithm, and resampled documents are varied by as
            much as documents differ, since the largest of a few is not the largest there is.
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
    below = above = student_t_975(num.size - 1)
    if num.size >= LEAST_FOR_BOOTSTRAP:
        if logarithmic:
            below, above = _smoothed_widths(num, den, value, resamples, seed)
        else:
            below = above = _studentized_width(num, den, value, resamples, seed)
    if logarithmic:
        unit = error / value
        return Interval(value, value * float(np.exp(-below * unit)), value * float(np.exp(above * unit)))
    return Interval(value, value - below * error, value + above * error)


def quantile_interval(
    values: ArrayLike, documents: ArrayLike, q: float, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """A quantile of pooled token values with an interval over documents.

    Woodruff 1952 (JASA 47): the interval of the share above the quantile, read back through the empirical quantile
    function. How much documents differ in that share is taken further down, where they hold about five such
    tokens each; what a rarer event adds is Poisson. Where fewer than one value would lie above the upper end, a
    Pareto tail fitted to the largest values carries on (Weissman 1978, JASA 73).
    """
    data, owners = np.asarray(values, np.float64), np.asarray(documents)
    ordered = np.sort(data)
    size = len(ordered)
    value = _quantile(ordered, q)
    names, index = np.unique(owners, return_inverse=True)
    tokens = np.bincount(index, minlength=len(names)).astype(np.float64)
    beyond = int(np.count_nonzero(data > value))
    common = max(1 - q, min(_COMMON_SHARE, _COMMON_TOKENS * len(names) / size))
    counts = np.bincount(index, weights=data > _quantile(ordered, 1 - common), minlength=len(names))
    seen = float(counts.sum())
    if beyond == 0 or len(names) < 2:
        return Interval(value, None, None)
    error = _ratio_error(counts.astype(np.float64), tokens, seen / size) / (seen / size)
    widths = 2 * (student_t_975(len(names) - 1),)
    if len(names) >= LEAST_FOR_BOOTSTRAP and error > 0:
        poisson = len(names) / seen
        widths = _smoothed_widths(counts.astype(np.float64), tokens, seen / size, resamples, seed, poisson)
    rarer = student_t_975(len(names) - 1) ** 2 * max(0.0, 1 / beyond - 1 / seen)
    more, fewer = (beyond * float(np.exp(sign * np.hypot(width * error, np.sqrt(rarer))))
                   for sign, width in zip((1, -1), widths, strict=True))  # fmt: skip
    low = _quantile(ordered, 1 - more / size)
    high = _quantile(ordered, 1 - fewer / size) if fewer >= 1 else _beyond_largest(ordered, fewer)
    return Interval(value, min(low, value), max(high, value))


def median_interval(samples: ArrayLike) -> Interval:
    """The median of repeated timings.

    From six samples on, the interval lies between order statistics, which holds for any distribution. Five give
    their range, which holds the median in 93.75%, and a little more; two to four Student's t on the logarithms,
    or on the values where one is not positive.
    """
    data = np.sort(np.asarray(samples, np.float64))
    if data.size == 0:
        raise ValueError("no samples")
    value = float(np.median(data))
    if data.size < 2:
        return Interval(value, None, None)
    if data.size >= 6:
        return Interval(value, *_order_interval(data))
    if data.size == 5:
        low, high = (value + _BEYOND_FIVE * (float(end) - value) for end in (data[0], data[-1]))
        return Interval(value, low, high)
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


def share_interval(hits: ArrayLike, counts: ArrayLike) -> Interval:
    """A share in [0, 1] over documents, or over items of which each counts 1.

    Wilson's interval at the number of independent trials that would give the same error between documents
    (Korn and Graubard 1998, Survey Methodology 24), with Student's t. When all or none hit, the exact binomial
    bound on tokens.
    """
    yes, all_ = np.asarray(hits, np.float64), np.asarray(counts, np.float64)
    total = float(all_.sum())
    share = float(yes.sum() / total)
    if share in (0.0, 1.0):
        slack = float(min(1.0, -np.log(0.025) / total))
        return Interval(share, 0.0, slack) if share == 0.0 else Interval(share, 1.0 - slack, 1.0)
    if yes.size < 2:
        return Interval(share, None, None)
    error = _ratio_error(yes, all_, share)
    if error == 0.0:
        return Interval(share, share, share)
    squared = student_t_975(yes.size - 1) ** 2 * error**2 / (share * (1 - share))  # t^2 / trials
    centre = (share + squared / 2) / (1 + squared)
    half = np.sqrt(squared * share * (1 - share) + squared**2 / 4) / (1 + squared)
    return Interval(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def _quantile(ordered: Float64, q: float) -> float:
    """The smallest value that at least a share q does not exceed."""
    return float(ordered[min(len(ordered) - 1, max(0, int(np.ceil(q * len(ordered))) - 1))])


def _beyond_largest(ordered: Float64, expected: float) -> float:
    """Where so many values (less than one) are expected above, if the largest values follow a Pareto tail."""
    top = ordered[-min(_TAIL_VALUES, len(ordered) // 10 + 2) :]
    if top[0] <= 0:
        return float(top[-1])
    shape = float(np.mean(np.log(top[1:] / top[0])))
    return float(top[-1] * expected**-shape)


def _ratio_error(num: Float64, den: Float64, value: float) -> float:
    """Linearised standard error of a ratio of sums over independent documents."""
    n = num.size
    squares = float(np.sum((num - value * den) ** 2))
    # Differences at the level of rounding are no variation.
    if squares <= n * (1e-14 * float(np.max(np.abs(num), initial=0.0))) ** 2:
        return 0.0
    return float(np.sqrt(n / (n - 1) * squares) / den.sum())


def _studentized_width(num: Float64, den: Float64, value: float, resamples: int, seed: int) -> float:
    """The 95% quantile of |t| over resampled documents."""
    n = num.size
    rng = np.random.default_rng(seed)
    columns = np.stack([num, den, num * num, num * den, den * den], axis=1)  # (documents, 5)
    resamples = min(resamples, max(_LEAST_RESAMPLES, _PLAIN_CELLS // n))
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
            t = np.abs(ratio - value) / error
        found.append(np.where(np.isnan(t), np.inf, t))
    width = float(np.quantile(np.concatenate(found), 0.95, method="lower"))
    return min(width, student_t_975(1))


def _smoothed_widths(
    num: Float64, den: Float64, value: float, resamples: int, seed: int, noise: float = 0.0
) -> tuple[float, float]:
    """How many standard errors of the logarithm the interval reaches down and up.

    Resampled documents are multiplied by lognormal noise of mean 1, as wide as their own ratios; |t| sets both
    ends, and the upper end goes on to where the lower tail of t asks for it. `noise` is the part of the variance of
    the logarithms that is not the documents' own.
    """
    n = num.size
    ratios = num[num > 0] / den[num > 0]
    spread = float(np.sqrt(max(0.0, np.log(ratios).var(ddof=1) - noise))) if ratios.size > 1 else 0.0
    rng = np.random.default_rng(seed)
    found = []
    resamples = min(resamples, max(_LEAST_RESAMPLES, _SMOOTHED_CELLS // n))
    chunk = max(1, min(resamples, _CHUNK_CELLS // n))
    for start in range(0, resamples, chunk):
        drawn = rng.integers(0, n, (min(chunk, resamples - start), n))
        varied = np.exp(spread * rng.standard_normal(drawn.shape, np.float32) - spread * spread / 2)
        top, bottom = num[drawn] * varied, den[drawn]
        sums = bottom.sum(axis=1)
        ratio = top.sum(axis=1) / sums
        squares = np.sum((top - ratio[:, None] * bottom) ** 2, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(np.log(ratio / value) * ratio * sums / np.sqrt(n / (n - 1) * squares))
    t = np.concatenate(found)
    t = t[np.isfinite(t)]
    both = float(np.quantile(np.abs(t), 0.95))
    most = student_t_975(1)
    return min(most, both), min(most, max(both, -float(np.quantile(t, 0.025))))


def _student(data: Float64) -> tuple[float, float]:
    half = student_t_975(data.size - 1) * float(data.std(ddof=1)) / float(np.sqrt(data.size))
    return float(data.mean()), half


def _order_interval(ordered: Float64) -> tuple[float, float]:
    """95% for the median between two pairs of order statistics, interpolated (Hettmansperger and Sheather 1986)."""
    from scipy.stats import binom

    n = ordered.size
    depth = int(max(1, binom.ppf(0.025, n, 0.5)))  # the deepest pair that holds the median in at least 95%
    surer, less = (1 - 2 * float(binom.cdf(at - 1, n, 0.5)) for at in (depth, depth + 1))
    share = (surer - 0.95) / (surer - less)
    inwards = (n - depth) * share / (depth + (n - 2 * depth) * share)
    low = (1 - inwards) * ordered[depth - 1] + inwards * ordered[depth]
    high = (1 - inwards) * ordered[n - depth] + inwards * ordered[n - depth - 1]
    return float(low), float(high)


def student_t_975(degrees: int) -> float:
    """The 97.5% quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))
