"""How often a verdict is wrong: sets of limits on candidates whose truth is known, judged by the real code.

Candidates are the schemes that `real_scores.py` scored; the whole population of documents is the truth on quality.
Each set of one to three limits (quality, bytes, times; absolute and relative) goes through `choose` on a select
sample and `confirm_trial` and `judge_trial` on fresh ones, so the winner's luck and the repeated looks are included.
Times are made up: medians of each candidate, noise of its own, spikes, and a drift that all candidates share.

Half of the sets are near a boundary: a limit lies within 5% of the truth of a candidate (0.2 points of ppl_increase,
0.4 of agreement); half of these confirm that very candidate, as `trilemma check` would. In the other half every limit
is farther than `AWAY` from the truth of every candidate.

    python benchmarks/verdicts.py --real scores.npz --sets 200

Exits 1 when the 95% upper bound (Clopper-Pearson) of the false-PASS rate is above 5%, or more than 10% of the sets
away from the boundary are INCONCLUSIVE. `--uncorrected` shows what looking after every repetition would do.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from real_scores import RealScores
from scipy.stats import beta

from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.metric import resolve_metric
from trilemma.core.recipe import Recipe, Step
from trilemma.core.trial import Trial
from trilemma.measure.stats import Interval, quantile_interval, ratio_interval, share_interval
from trilemma.measure.timing.speed import timed_measurement
from trilemma.search import confirm
from trilemma.search.deadline import Deadline
from trilemma.search.decide import choose, objective_for
from trilemma.search.judge import judge_trial, outcome_of
from trilemma.search.workbench import MOST_REPETITIONS

SELECT_DOCUMENTS, CONFIRM_DOCUMENTS = 32, (38, 76, 152)  # what the default amounts of text come to
SELECT_REPETITIONS = 5
BASE = "unmodified"
BYTES = {BASE: 1.0, "W8A8": 0.51, "W8A8-g32": 0.56, "W4A8-g32": 0.31, "W4A8-g128": 0.28}  # of 14 MB
NEAR = 0.05  # of the truth; a third of AWAY_ABSOLUTE there, and in proportion with --near
AWAY = {"kl_mean": 0.15, "kl_p99": 0.25, "perplexity": 0.15, "bits_per_byte": 0.05, "tpot_s": 0.10,
        "decode_tokens_per_s": 0.10, "weights_bytes": 0.0}  # fmt: skip
AWAY_ABSOLUTE = {"ppl_increase": 0.006, "top1_agreement": 0.012}
METRICS = (*AWAY, *AWAY_ABSOLUTE)
QUALITY = tuple(metric for metric in METRICS if metric not in ("tpot_s", "decode_tokens_per_s", "weights_bytes"))
TIMES = ("tpot_s", "decode_tokens_per_s")

Floats = NDArray[np.float64]
Truth = dict[str, dict[str, float]]


class Population:
    """Documents of one kind of text: sums of each candidate's token figures, and the tokens' KL for quantiles."""

    def __init__(self, scores: RealScores, domain: str) -> None:
        kept = np.flatnonzero(scores.domains == domain)
        starts = np.searchsorted(scores.owners, kept)
        ends = np.searchsorted(scores.owners, kept, side="right")
        self.size, self.counts, self.text_bytes = len(kept), (ends - starts).astype(float), scores.text_bytes[kept]
        base = scores.base_nll.astype(np.float64)
        ones = np.ones(len(base))
        tokens = {name: (scores.nll[name], scores.kl[name], scores.agrees[name]) for name in BYTES if name != BASE}
        tokens[BASE] = (base, 1e-6 * ones, ones)  # type: ignore[assignment]
        self.sums, self.kl = {}, {}
        for name, (nll, kl, agrees) in tokens.items():
            figures = {"nll": nll.astype(np.float64), "lost": nll - base, "kl": kl, "agrees": agrees}
            self.sums[name] = {
                key: np.bincount(scores.owners, weights=values, minlength=len(scores.domains))[kept]
                for key, values in figures.items()
            }
            self.kl[name] = [kl[start:end].astype(np.float64) for start, end in zip(starts, ends, strict=True)]
        everything = np.arange(self.size)
        self.truth = {
            name: {metric: self.figure(metric, name, everything, 1).value for metric in QUALITY} for name in BYTES
        }

    def figure(self, metric: str, name: str, documents: NDArray[np.int64], resamples: int = 1000) -> Interval:
        sums, counts = self.sums[name], self.counts[documents]
        logs = partial(ratio_interval, scale="log", resamples=resamples)
        if metric == "kl_p99":
            parts = [self.kl[name][index] for index in documents]
            owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            return quantile_interval(np.concatenate(parts), owners, 0.99, resamples=resamples)
        if metric == "top1_agreement":
            return share_interval(sums["agrees"][documents], counts)
        if metric == "kl_mean":
            return logs(sums["kl"][documents], counts)
        if metric == "bits_per_byte":
            return logs(sums["nll"][documents] / np.log(2), self.text_bytes[documents])
        if metric == "perplexity":
            return _mapped(logs(sums["nll"][documents], counts), np.exp)
        return _mapped(ratio_interval(sums["lost"][documents], counts, resamples=resamples), np.expm1)


@dataclass
class World:
    """A population and a made-up machine; draws samples of both."""

    population: Population
    rng: np.random.Generator
    tpot_s: dict[str, float] = field(init=False)
    drift: float = 0.0

    def __post_init__(self) -> None:
        base = 0.001 * float(self.rng.uniform(1, 50))
        self.tpot_s = {name: base * (1.0 if name == BASE else float(self.rng.uniform(0.25, 0.8))) for name in BYTES}

    def truth(self) -> Truth:
        return {
            name: {**self.population.truth[name], "weights_bytes": 14e6 * BYTES[name], "tpot_s": self.tpot_s[name],
                   "decode_tokens_per_s": 1 / self.tpot_s[name]}
            for name in BYTES
        }  # fmt: skip

    def quality(self, name: str, documents: NDArray[np.int64], metrics: Sequence[str]) -> dict[str, Measurement]:
        found = {metric: self.population.figure(metric, name, documents) for metric in metrics}
        return {
            metric: Measurement.of(metric, interval.value, ci95=interval.ci95, n=len(documents))
            for metric, interval in found.items()
        }

    def documents(self, count: int) -> NDArray[np.int64]:
        return self.rng.integers(0, self.population.size, count)

    def times(self, count: int) -> dict[str, Floats]:
        """Seconds per token of each candidate in `count` interleaved repetitions."""
        found: dict[str, list[float]] = {name: [] for name in BYTES}
        for _ in range(count):
            self.drift = 0.8 * self.drift + 0.01 * float(self.rng.normal())
            for name, samples in found.items():
                late = 1 + self.rng.exponential(0.3) if self.rng.random() < 0.1 else 1.0
                # spikes move the median a little: the truth is that of the noise without drift
                samples.append(self.tpot_s[name] * late * np.exp(self.drift + 0.02 * self.rng.normal()) / SPIKED)
        return {name: np.asarray(samples) for name, samples in found.items()}


class Bench:
    """What `confirm_trial` measures with: a world instead of engines."""

    def __init__(self, world: World, metrics: Sequence[str]) -> None:
        self.world, self.metrics = world, metrics
        self.with_energy_sensor = False
        self.model = SimpleNamespace(path=None)
        self._read = np.zeros(0, np.int64)

    def refer(self, part: str, documents: int) -> None:
        """The text so far and more documents that nobody has seen."""
        self._read = np.concatenate([self._read, self.world.documents(documents - len(self._read))])

    def quality(self, engine: str, part: str) -> dict[str, Measurement]:
        return self.world.quality(engine, self._read, self.metrics)

    def cost(
        self, model: object, engine: str, *, repetitions: int, settled: Callable[[Any, Any], bool]
    ) -> tuple[dict[str, Measurement], dict[str, Measurement]]:
        drawn = self.world.times(MOST_REPETITIONS)
        for count in range(repetitions, MOST_REPETITIONS + 1):
            ours, theirs = (times(drawn[name][:count]) for name in (engine, BASE))
            if settled(ours, theirs):
                break
        return ours | weights(engine), theirs | weights(BASE)


def times(samples: Floats) -> dict[str, Measurement]:
    series = {"tpot_s": samples, "decode_tokens_per_s": 1 / samples}
    return {metric: timed_measurement(metric, list(values), "", False, {}) for metric, values in series.items()}


def weights(name: str) -> dict[str, Measurement]:
    return {"weights_bytes": Measurement.of("weights_bytes", 14e6 * BYTES[name])}


def make_limit(metric: str, value: float, relative: bool) -> Limit:
    op = "<=" if resolve_metric(metric).direction == "lower" else ">="
    return Limit(metric=metric, op=op, value=value, relative=relative, text=f"{metric}{op}{value:.5g}")  # type: ignore[arg-type]


def draw_limits(truth: Truth, pivot: str | None, rng: np.random.Generator, near: float = NEAR) -> list[Limit]:
    """One to three limits; with a pivot the first lies near that candidate's truth, the others where they fall."""
    chosen = [str(metric) for metric in rng.permutation(METRICS)[: rng.integers(1, 4)]]
    if pivot is not None and chosen[0] == "weights_bytes":
        chosen = ["kl_mean"]  # a count of bytes is exact: nothing is near it
    limits = []
    for place, metric in enumerate(chosen):
        relative = metric in (*TIMES, "weights_bytes") and bool(rng.random() < 0.5)
        values = {n: truth[n][metric] / (truth[BASE][metric] if relative else 1.0) for n in BYTES}
        width = AWAY_ABSOLUTE.get(metric)
        if pivot is not None and place == 0:
            value = values[pivot]
            value += float(rng.uniform(-1, 1)) * near * (abs(value) if width is None else width / 3 / NEAR)
        else:
            value = _away(np.asarray(list(values.values())), AWAY.get(metric), width, rng)
        limits.append(make_limit(metric, value, relative))
    return limits


def _away(values: Floats, share: float | None, width: float | None, rng: np.random.Generator) -> float:
    """A limit between or around the truths, none of which is near it."""
    low, high = values.min(), values.max()
    while True:
        if width is not None:
            value = float(rng.uniform(low - 2 * width, high + 2 * width))
            if np.all(np.abs(values - value) > width):
                return value
        elif share is not None:
            value = float(np.exp(rng.uniform(np.log(low) - 0.5, np.log(high) + 0.5)))
            if np.all(np.abs(np.log(values / value)) > np.log1p(share)):
                return value


def keeps(limit: Limit, truth: Truth, name: str) -> bool:
    value = truth[name][limit.metric] / (truth[BASE][limit.metric] if limit.relative else 1.0)
    return value <= limit.value if limit.op == "<=" else value >= limit.value


def judge_set(world: World, truth: Truth, limits: Sequence[Limit], given: str | None) -> tuple[str, bool]:
    """(outcome, whether it is false): select on one sample, confirm on others.

    `given` is confirmed whatever the select sample says, as `trilemma check` does.
    """
    objective = objective_for(limits)
    wanted = list(dict.fromkeys(["kl_mean", *(limit.metric for limit in limits), objective.metric]))
    metrics = [metric for metric in wanted if metric in QUALITY]
    documents, trials = world.documents(SELECT_DOCUMENTS), []
    for name in BYTES:
        drawn = world.times(SELECT_REPETITIONS)
        found = world.quality(name, documents, metrics) | times(drawn[name]) | weights(name)
        steps = () if name == BASE else (Step(technique=name),)
        trials.append(Trial(name=name, recipe=Recipe(name=name, steps=steps), measurements=found,
                            status="baseline" if name == BASE else "measured",
                            paired_baseline=times(drawn[BASE]) | weights(BASE)))  # fmt: skip
    trial = choose(trials, limits, objective, trials[0]).trial if given is None else trials[list(BYTES).index(given)]
    if trial is None:
        return "FAIL", any(all(keeps(limit, truth, name) for limit in limits) for name in BYTES)
    name = trial.name
    confirmed = confirm.confirm_trial(
        Bench(world, metrics), trial, SimpleNamespace(path=None), name, limits, trials[0],  # type: ignore[arg-type]
        Deadline(1e9), CONFIRM_DOCUMENTS,  # type: ignore[arg-type]
    )  # fmt: skip
    outcome = outcome_of(judge_trial(confirmed, limits, trials[0]))
    inside = all(keeps(limit, truth, name) for limit in limits)
    return outcome, (outcome == "PASS" and not inside) or (outcome == "FAIL" and inside)


def upper(count: int, of: int) -> float:
    """Clopper-Pearson, 95% one-sided."""
    return 1.0 if count >= of else float(beta.ppf(0.95, count + 1, of - count))


def uncorrected() -> None:
    """As if one look had been taken: after every repetition, with plain intervals."""
    confirm.TIME_LOOKS, confirm.TIME_MARGIN = tuple(range(9, MOST_REPETITIONS + 1)), 1.0  # type: ignore[assignment]
    confirm.TEXT_MARGINS = (1.0, 1.0, 1.0)


def _mapped(found: Interval, function: Callable[[float], float]) -> Interval:
    return Interval(*(None if end is None else float(function(end)) for end in found))  # type: ignore[arg-type]


def _spiked() -> float:
    rng = np.random.default_rng(0)
    noise = np.exp(0.02 * rng.normal(size=400_000))
    return float(np.median(noise * np.where(rng.random(400_000) < 0.1, 1 + rng.exponential(0.3, 400_000), 1)))


SPIKED = _spiked()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, help="scores that real_scores.py wrote")
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--near", type=float, default=NEAR, help="half-width of the limits about a truth")
    parser.add_argument("--uncorrected", action="store_true")
    options = parser.parse_args()
    if options.uncorrected:
        uncorrected()
    scores = RealScores.load(options.real)
    populations = [Population(scores, str(domain)) for domain in list(dict.fromkeys(scores.domains))[:2]]
    rng = np.random.default_rng(options.seed)
    counts: dict[tuple[bool, str, bool], int] = {}
    began = time.perf_counter()
    for index in range(options.sets):
        world = World(populations[index // 2 % 2], rng)
        truth, near = world.truth(), index % 2 == 0
        pivot = str(rng.choice(list(BYTES)[1:])) if near else None
        given = pivot if index % 8 in (0, 6) else None
        key = (near, *judge_set(world, truth, draw_limits(truth, pivot, rng, options.near), given))
        counts[key] = counts.get(key, 0) + 1
        if index % 20 == 19:
            left = (time.perf_counter() - began) * (options.sets / (index + 1) - 1)
            print(f"{index + 1} of {options.sets} sets, {left:.0f} s left", file=sys.stderr, flush=True)
    return report(counts)


def report(counts: dict[tuple[bool, str, bool], int]) -> int:
    print("| sets | PASS | of these false | FAIL | of these false | INCONCLUSIVE | false PASS | upper bound |")
    print("|---|---|---|---|---|---|---|---|")
    bound, open_away = 1.0, 1.0
    for name, which in (("near a boundary", (True,)), ("away from it", (False,)), ("all", (True, False))):

        def total(outcome: str, false: bool | None = None, which: tuple[bool, ...] = which) -> int:
            return sum(n for (near, o, f), n in counts.items()
                       if near in which and o == outcome and (false is None or f == false))  # fmt: skip

        every = total("PASS") + total("FAIL") + total("INCONCLUSIVE")
        bound = upper(total("PASS", True), every)
        if name == "away from it":
            open_away = total("INCONCLUSIVE") / every
        print(f"| {every} {name} | {total('PASS')} | {total('PASS', True)} | {total('FAIL')} | {total('FAIL', True)} "
              f"| {total('INCONCLUSIVE') / every:.1%} | {total('PASS', True) / every:.2%} | {bound:.2%} |")  # fmt: skip
    return 0 if bound <= 0.05 and open_away <= 0.10 else 1


if __name__ == "__main__":
    sys.exit(main())
