"""How often the 95% intervals hold a known truth, for every kind of figure, at few and at many documents.

Two sorts of populations: made-up ones (unequal lengths that go with the values, heavy tails), and real ones:
documents drawn with replacement from those that `real_scores.py` scored, whose own figure is the truth.
Populations marked 'stress' differ between documents by more than any real one here; they are shown, not judged.

    python benchmarks/real_scores.py MODEL kids=valid.txt adult=other.txt --out scores.npz
    python benchmarks/coverage.py --real scores.npz

Exits 1 when a judged coverage lies outside 93 to 97% by more than two standard errors of the repetitions
(1.4 points with 1,000); how many lie outside without that allowance is printed too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from real_scores import RealScores

from trilemma.measure.stats import (
    Interval,
    mean_interval,
    median_interval,
    paired_ratio,
    quantile_interval,
    ratio_interval,
    share_interval,
)

DOCUMENTS = (5, 10, 20, 40, 80)
REPETITIONS = (5, 6, 7, 8, 9, 15, 30)
LOW, HIGH = 0.93, 0.97
LARGE = 400_000  # documents or samples that stand for the whole population

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Interval]


@dataclass(frozen=True)
class Case:
    """One figure of one population: `draw` samples n units and gives the interval."""

    figure: str
    population: str
    truth: float
    draw: Draw
    sizes: tuple[int, ...] = DOCUMENTS
    judged: bool = True


@dataclass(frozen=True)
class Row:
    figure: str
    population: str
    n: int
    coverage: float
    truth_below: float
    truth_above: float
    width: float  # mean, relative to the truth where that is not 0
    judged: bool

    def outside(self, repetitions: int) -> tuple[bool, bool]:
        """Whether it misses the bar plainly, and by more than two standard errors."""
        distance = max(LOW - self.coverage, self.coverage - HIGH)
        error = float(np.sqrt(0.95 * 0.05 / repetitions))
        return distance > 1e-9, distance > 2 * error


def drawn(interval: Callable[..., Interval], sample: Callable[[np.random.Generator, int], Iterable[Floats]]) -> Draw:
    """Sample, then the interval of it with a seed of its own."""
    return lambda rng, n: interval(*sample(rng, n), seed=int(rng.integers(2**31)))


def measure(case: Case, n: int, repetitions: int) -> Row:
    """Draw again and again; an interval without an end holds everything on that side."""
    rng = np.random.default_rng([n, len(case.figure), len(case.population)])
    below = above = unbounded = 0
    widths = []
    for _ in range(repetitions):
        found = case.draw(rng, n)
        if found.low is None or found.high is None:
            unbounded += 1
            continue
        below += case.truth < found.low
        above += case.truth > found.high
        widths.append(found.high - found.low)
    scale = abs(case.truth) or 1.0
    width = float(np.mean(widths)) / scale if widths else float("inf")
    return Row(case.figure, case.population, n, 1 - (below + above) / repetitions, below / repetitions,
               above / repetitions, width, case.judged)  # fmt: skip


def made_up_ratios(resamples: int) -> Iterator[Case]:
    """Ratios over documents whose lengths are lognormal 0.5 and go with the values (correlation 0.4)."""
    kinds: dict[str, tuple[str, str, Callable[[np.random.Generator, Floats], Floats], bool]] = {
        "nats, normal 0.3": ("perplexity", "log", lambda g, z: 3.8 + 0.3 * z, True),
        "bits, gamma": ("bits_per_byte", "log", lambda g, z: 1.0 + 0.1 * g.gamma(4, 1, z.shape) + 0.02 * z, True),
        "t5 tails": ("ppl_increase", "linear", lambda g, z: 0.01 + 0.02 * (g.standard_t(5, z.shape) + 0.3 * z), True),
        "t3 tails": ("ppl_increase", "linear", lambda g, z: 0.01 + 0.02 * (g.standard_t(3, z.shape) + 0.3 * z), True),
        "skewed": ("ppl_increase", "linear", lambda g, z: 0.01 + 0.02 * np.exp(0.7 * z), False),
        "lognormal 0.3": ("kl_mean", "log", lambda g, z: np.exp(-5 + 0.3 * z), True),
        "lognormal 0.5": ("kl_mean", "log", lambda g, z: np.exp(-5 + 0.5 * z), True),
        "lognormal 1.0": ("kl_mean", "log", lambda g, z: np.exp(-5 + 1.0 * z), True),
        "15% fourfold": (
            "kl_mean", "log", lambda g, z: np.exp(0.3 * z) * np.where(g.random(z.shape) < 0.15, 4, 1), False,
        ),
    }  # fmt: skip

    def sample(value: Callable[[np.random.Generator, Floats], Floats], rng: np.random.Generator, n: int) -> Floats:
        length = rng.normal(size=n)
        z = 0.4 * length + np.sqrt(1 - 0.16) * rng.normal(size=n)
        tokens = 500 * np.exp(0.5 * length)
        return np.stack([value(rng, z) * tokens, tokens])

    for name, (figure, scale, value, judged) in kinds.items():
        everything = sample(value, np.random.default_rng(1), LARGE).sum(axis=1)

        interval = partial(ratio_interval, scale=scale, resamples=resamples)
        yield Case(figure, name, float(everything[0] / everything[1]),
                   drawn(interval, partial(sample, value)), judged=judged)  # fmt: skip


def made_up_shares() -> Iterator[Case]:
    """Agreement that differs between documents; accuracy over items, ten for each 'document'."""

    def agreement(rng: np.random.Generator, n: int) -> Interval:
        tokens = np.maximum(30, 500 * np.exp(0.5 * rng.normal(size=n))).astype(int)
        hits = rng.binomial(tokens, rng.beta(90, 10, n))
        return share_interval(hits, tokens)

    yield Case("top1_agreement", "beta 90:10", 0.9, agreement)
    for truth in (0.27, 0.5, 0.83):

        def accuracy(rng: np.random.Generator, n: int, truth: float = truth) -> Interval:
            hits = rng.random(10 * n) < truth
            return share_interval(hits, np.ones(10 * n))

        yield Case("accuracy", f"{truth:.0%} of 10n items", truth, accuracy)


def made_up_quantiles(resamples: int) -> Iterator[Case]:
    """Quantiles of tokens, lognormal 1.2 within documents and 0.3 between them."""

    def sample(rng: np.random.Generator, n: int) -> tuple[Floats, NDArray[np.int64]]:
        tokens = np.clip(500 * np.exp(0.5 * rng.normal(size=n)), 60, 1536).astype(int)
        owners = np.repeat(np.arange(n), tokens)
        return np.exp(0.3 * rng.normal(size=n)[owners] + 1.2 * rng.normal(size=len(owners))), owners

    whole = np.sort(sample(np.random.default_rng(1), 4000)[0])
    for figure, q in (("kl_p99", 0.99), ("kl_p999", 0.999)):
        interval = partial(quantile_interval, q=q, resamples=resamples)
        truth = float(whole[int(np.ceil(q * len(whole))) - 1])
        yield Case(figure, "lognormal 0.3", truth, drawn(interval, sample))


def made_up_times() -> Iterator[Case]:
    """Repeated timings: log-normal noise, exponential noise, and 15% of spikes that a busy machine adds."""

    def plain(rng: np.random.Generator, n: int) -> Floats:
        return np.exp(0.03 * rng.normal(size=n))

    def exponential(rng: np.random.Generator, n: int) -> Floats:
        return 1 + 0.05 * rng.exponential(size=n)

    def spikes(rng: np.random.Generator, n: int) -> Floats:
        late = np.where(rng.random(n) < 0.15, 1 + rng.exponential(0.3, n), 1)
        return np.exp(0.02 * rng.normal(size=n)) * late

    for name, noise in (("lognormal 3%", plain), ("exponential 5%", exponential), ("spikes 15%", spikes)):
        truth = float(np.median(noise(np.random.default_rng(1), LARGE)))
        yield Case("tpot_s", name, truth, lambda g, n, f=noise: median_interval(f(g, n)), REPETITIONS)  # type: ignore[misc]

        yield Case("time ratio", name, 0.8, lambda g, n, f=noise: _ratio(f, g, n), REPETITIONS)  # type: ignore[misc]
    yield Case("energy", "normal 5%", 1.0, lambda g, n: mean_interval(1 + 0.05 * g.normal(size=n)), (3, *REPETITIONS))
    yield Case("energy", "gamma 16", 1.0, lambda g, n: mean_interval(g.gamma(16, 1 / 16, n)), (3, *REPETITIONS))


def _ratio(noise: Callable[[np.random.Generator, int], Floats], rng: np.random.Generator, n: int) -> Interval:
    drift = np.exp(np.cumsum(0.05 * rng.normal(size=n)))  # hits both
    return paired_ratio(list(drift * noise(rng, n)), list(0.8 * drift * noise(rng, n)))


def real(scores: RealScores, resamples: int) -> Iterator[Case]:
    """Every figure of two schemes on documents of one kind of text (the first), and of all kinds mixed."""
    for domain in (str(scores.domains[0]), "mixed"):
        kept = np.flatnonzero((scores.domains == domain) | (domain == "mixed"))
        for scheme in ("W8A8-g32", "W4A8-g32"):
            yield from _real_ratios(scores, kept, domain, scheme, resamples)
            yield from _real_quantiles(scores, kept, domain, scheme, resamples)


def _real_ratios(
    scores: RealScores, kept: NDArray[np.int64], domain: str, scheme: str, resamples: int
) -> Iterator[Case]:
    def sums(values: NDArray[np.floating]) -> Floats:
        return np.bincount(scores.owners, weights=values, minlength=len(scores.domains))[kept]

    counts = sums(np.ones(len(scores.owners)))
    ratios = partial(ratio_interval, resamples=resamples)
    logs = partial(ratio_interval, resamples=resamples, scale="log")
    nats = sums(scores.nll[scheme].astype(np.float64))
    figures = {
        "perplexity": (nats, counts, logs),
        "bits_per_byte": (nats / np.log(2), scores.text_bytes[kept], logs),
        "ppl_increase": (sums(scores.nll[scheme].astype(np.float64) - scores.base_nll), counts, ratios),
        "kl_mean": (sums(scores.kl[scheme]), counts, logs),
        "top1_agreement": (sums(scores.agrees[scheme]), counts, _share),
    }
    for figure, (num, den, interval) in figures.items():
        if scheme == "W8A8-g32" and figure in ("perplexity", "bits_per_byte"):
            continue  # as good as the same numbers

        both = np.stack([num, den])
        draw = drawn(interval, lambda rng, n, both=both: both[:, rng.integers(0, both.shape[1], n)])  # type: ignore[misc]
        yield Case(figure, f"{domain} {scheme}", float(num.sum() / den.sum()), draw)


def _share(hits: Floats, counts: Floats, seed: int) -> Interval:
    return share_interval(hits, counts)


def _real_quantiles(
    scores: RealScores, kept: NDArray[np.int64], domain: str, scheme: str, resamples: int
) -> Iterator[Case]:
    values = scores.kl[scheme].astype(np.float64)
    starts = np.searchsorted(scores.owners, kept)
    ends = np.searchsorted(scores.owners, kept, side="right")
    parts = [values[start:end] for start, end in zip(starts, ends, strict=True)]
    whole = np.sort(np.concatenate(parts))
    for figure, q in (("kl_p99", 0.99), ("kl_p999", 0.999)):

        def draw(rng: np.random.Generator, n: int, q: float = q) -> Interval:
            chosen = rng.integers(0, len(parts), n)
            owners = np.repeat(np.arange(n), [len(parts[index]) for index in chosen])
            drawn = np.concatenate([parts[index] for index in chosen])
            return quantile_interval(drawn, owners, q, resamples=resamples, seed=int(rng.integers(2**31)))

        yield Case(figure, f"{domain} {scheme}", float(whole[int(np.ceil(q * len(whole))) - 1]), draw)


def cases(scores: RealScores | None, resamples: int, made_up: bool) -> Iterator[Case]:
    if made_up:
        yield from made_up_times()
        yield from made_up_shares()
        yield from made_up_ratios(resamples)
        yield from made_up_quantiles(resamples)
    if scores is not None:
        yield from real(scores, resamples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="scores that real_scores.py wrote")
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1000, help="of each bootstrap")
    parser.add_argument("--only", default="", help="figures whose name holds this")
    parser.add_argument("--no-made-up", action="store_true", help="real populations alone")
    parser.add_argument("--json", type=Path, help="append each row as a line")
    options = parser.parse_args()
    scores = RealScores.load(options.real) if options.real else None
    print("| figure | population | n | coverage % | truth below % | truth above % | mean width | |")
    print("|---|---|---|---|---|---|---|---|")
    judged = strict = missed = 0
    for case in cases(scores, options.resamples, not options.no_made_up):
        if options.only not in case.figure:
            continue
        for n in case.sizes:
            row = measure(case, n, options.repetitions)
            plain, clear = row.outside(options.repetitions)
            mark = ("outside" if clear else "within error" if plain else "") if row.judged else "stress"
            judged, strict, missed = (
                judged + row.judged,
                strict + (row.judged and plain),
                missed + (row.judged and clear),
            )
            print(f"| {row.figure} | {row.population} | {n} | {row.coverage:.1%} | {row.truth_below:.1%} "
                  f"| {row.truth_above:.1%} | {row.width:.3g} | {mark} |", flush=True)  # fmt: skip
            if options.json:
                with options.json.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row.__dict__) + "\n")
    print(f"\n{judged} judged: {judged - strict} within 93 to 97%, {strict - missed} more within two standard errors, "
          f"{missed} outside.")  # fmt: skip
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
