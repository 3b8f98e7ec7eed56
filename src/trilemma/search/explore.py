"""The search proper: the unmodified model first, then recipe after recipe until the time is used.

Left out: choosing among the trials (`decide.py`) and the last look at the chosen one (`conclude.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from trilemma.core.errors import RecipeError, TrilemmaError
from trilemma.core.limit import Limit
from trilemma.core.recipe import Recipe
from trilemma.core.trial import Trial
from trilemma.formats.artifact import read_artifact, write_artifact
from trilemma.formats.pack import format_bytes
from trilemma.measure.energy.build_cost import BuildMeter
from trilemma.model.model import Model
from trilemma.search.allocate import HIGH, LOW, allocation, parts_of, sensitivities
from trilemma.search.deadline import Deadline
from trilemma.search.journal import Journal
from trilemma.search.plan import TextPlan
from trilemma.search.predict import BuildTimes, impossible, predict_bytes
from trilemma.search.progress import Progress, ProgressCallback
from trilemma.search.space import candidates
from trilemma.search.texts import Texts
from trilemma.search.workbench import Measurements, Workbench
from trilemma.techniques.apply import apply_recipe, needs_calibration
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.technique import Build

BASELINE_NAME = "unmodified"
NO_TIME = "no time was left to build and measure it"
_UNIFORM_FIRST = 3  # recipes measured before sensitivities are
_CONFIRM_MEASURES = 3  # times that measuring a candidate takes
_TARGETS = (0.2, 0.4, 0.6, 0.8)  # of the way from all parts in 4 bits to all in 8


class _OutOfTimeError(Exception):
    """A build that would leave no time for the confirm run; raised out of its progress."""


@dataclass
class Exploration:
    """One search under way: what it knows, and the stages that add to it."""

    model: Model
    limits: tuple[Limit, ...]
    texts: Texts
    bench: Workbench
    journal: Journal
    deadline: Deadline
    tell: ProgressCallback
    seed: int = 0
    threads: int | None = None
    meter: BuildMeter | None = None  # of the whole search
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    times: BuildTimes = field(init=False)
    baseline: Trial = field(init=False)
    measure_s: float = 0.0
    run_off_s: float = 0.0  # kept back to time the leaders side by side
    leaders: tuple[str, ...] = ()  # names of those that were

    @property
    def text_plan(self) -> TextPlan:
        return self.journal.text_plan

    @property
    def untried(self) -> list[Trial]:
        """Recipes that only lacked time."""
        return [trial for trial in self.trials if trial.reason == NO_TIME]

    def __post_init__(self) -> None:
        self.times = BuildTimes(self.model)

    def say(self, stage: str, done: int, total: int, message: str) -> None:
        self.tell(Progress(stage, done, total, message, self.deadline.left_s))

    def measure_baseline(self) -> None:
        """Score the select text with the reference, then the unmodified model under the same measurements."""
        self.say("baseline", 0, 2, "scoring the select text with the unmodified model")
        token_set = self.texts.token_set("select", self.text_plan.select_tokens)
        self.bench.refer("select", token_set)
        self.notes += self.bench.references["select"].notes
        self.say("baseline", 1, 2, "measuring the unmodified model")
        began = time.monotonic()
        found = self.bench.quality(self.bench.baseline, "select")
        found |= self.bench.cost(self.model, self.bench.baseline)[0]
        if self.model.path is not None:
            found |= self.bench.on_disk(self.model.path, peak=self._peak_is_limited)
        self.measure_s = time.monotonic() - began
        recipe = Recipe(name=BASELINE_NAME, seed=self.seed)
        self.baseline = Trial(name=BASELINE_NAME, recipe=recipe, status="baseline", measurements=found)

    @property
    def _peak_is_limited(self) -> bool:
        return any(limit.metric == "peak_memory_bytes" for limit in self.limits)

    def measure_candidates(self) -> None:
        """Build and measure one recipe after the other until the time that is not kept back is used."""
        queue = candidates(self.model.config, seed=self.seed)
        allocated = False
        tried = 0
        while queue:
            recipe = self._with_calibration(queue.pop(0))
            reason = self._not_worth_it(recipe)
            if reason:
                self.trials.append(Trial(name=recipe.name, recipe=recipe, status="dropped", reason=reason))
                continue
            if self._has_a_candidate and not self._affordable(recipe):
                self.trials.append(Trial(name=recipe.name, recipe=recipe, status="dropped", reason=NO_TIME))
                continue
            tried += 1
            self.say("search", tried, tried + len(queue), recipe.name)
            self.trials.append(self._trial(recipe))
            if not allocated and tried >= _UNIFORM_FIRST:
                allocated = True
                queue = self._allocations() + queue

    def _with_calibration(self, recipe: Recipe) -> Recipe:
        if needs_calibration(recipe, self.model.config):
            return recipe.model_copy(update={"calibration": self.texts.calibration_record})
        return recipe

    def _not_worth_it(self, recipe: Recipe) -> str:
        """Why a recipe is dropped without building it; empty when it is not."""
        try:
            predicted = predict_bytes(self.model, recipe, self.bench.lengths.context, runtime=self.bench.runtime)
        except RecipeError:
            return ""  # a step whose result nobody knows before: it has to be built
        blocked = impossible(predicted, self.limits, self.baseline.measurements)
        if blocked is None:
            return ""
        return f"by arithmetic it takes {predicted.least(blocked.metric) / 1e6:.2f} MB, so '{blocked.text}' fails"

    def predicted_weights(self, trial: Trial) -> int:
        """Bytes of the weights that a trial's recipe leaves, built or not."""
        return predict_bytes(self.model, trial.recipe, self.bench.lengths.context).weights_bytes

    def _affordable(self, recipe: Recipe) -> bool:
        if self.journal.find(recipe) is not None:
            return True
        return self.deadline.allows(self.times.expect_s(recipe) + self.measure_s, reserve_s=self.reserve_s)

    @property
    def _has_a_candidate(self) -> bool:
        return any(trial.status == "measured" for trial in self.trials)

    @property
    def reserve_s(self) -> float:
        """Seconds kept back for what comes after the candidates."""
        return self.run_off_s + self.confirm_s

    @property
    def confirm_s(self) -> float:
        """Seconds that the confirm run takes: both models on its text, timings, fresh processes, answers."""
        return self.text_plan.confirm_s + self.confirm_fixed_s

    def needed_s(self, missing: Sequence[Trial] = ()) -> float:
        """About the time of a search that also tries what is missing and confirms, in whole steps of 10 s."""
        candidates_s = sum(self.times.expect_s(trial.recipe) + self.measure_s for trial in missing)
        return 10 * math.ceil(1.2 * (self.deadline.spent_s + candidates_s + self.confirm_s) / 10)

    @property
    def confirm_fixed_s(self) -> float:
        """Of those, what less text would not save."""
        return _CONFIRM_MEASURES * self.measure_s

    def _trial(self, recipe: Recipe) -> Trial:
        """Build, open, take each measurement, keep the trial. A recipe that can not be built is a failed trial."""
        known = self.journal.find(recipe)
        if known is not None:
            self.notes.append(f"{recipe.name} was measured before an interruption and taken over")
            return known
        try:
            built, spent = self.build(recipe)
            began = time.monotonic()
            trial = self._measure(recipe, built, spent)
            self.measure_s = max(self.measure_s, time.monotonic() - began)
        except _OutOfTimeError:
            return Trial(name=recipe.name, recipe=recipe, status="dropped", reason=NO_TIME)
        except TrilemmaError as error:
            return Trial(name=recipe.name, recipe=recipe, status="failed", reason=str(error))
        self.journal.keep(trial)
        return trial

    def build(self, recipe: Recipe) -> tuple[Model, Measurements]:
        """The artifact, and the seconds and joules that building it took: none when it lay there already."""
        folder = self.journal.artifact_folder(recipe)
        if folder.exists():
            return read_artifact(folder), {}
        may_stop = self._has_a_candidate

        def step(done: int, total: int, what: str) -> None:
            self.say("build", done, total, f"{recipe.name}: {what}")
            if may_stop and not self.deadline.allows(self.measure_s, reserve_s=self.reserve_s):
                raise _OutOfTimeError

        build = Build(self.texts.calibration, self.seed, self.threads, progress=step)
        with BuildMeter() as meter:
            write_artifact(apply_recipe(self.model, recipe, build), folder, recipe)
        spent = meter.results()
        self.times.learn(recipe, spent["build_s"].value or 0.0)
        return read_artifact(folder), spent

    def _measure(self, recipe: Recipe, built: Model, spent: Measurements) -> Trial:
        assert built.path is not None
        engine = self.bench.open(built)
        try:
            found = self.bench.quality(engine, "select")
            ours, theirs = self.bench.cost(built, engine)
        finally:
            engine.close()
        found |= ours | self.bench.on_disk(built.path, peak=self._peak_is_limited) | spent
        return Trial(name=recipe.name, recipe=recipe, status="measured", measurements=found, paired_baseline=theirs)

    def _allocations(self) -> list[Recipe]:
        """Mixed recipes from measured sensitivities, when the time allows the measuring."""
        config = self.model.config
        parts = parts_of(config)
        small = self.bench.references["select"].token_set.predicted_tokens
        each_s = self.measure_s / 2 + self.times.expect_s(scheme_to_recipe("W4A8-g32")) / len(parts)
        if small == 0 or not self.deadline.allows(
            each_s * len(parts), reserve_s=self.reserve_s + self.deadline.limit_s / 3
        ):
            self.notes.append("sensitivities were not measured: no time")
            return []
        kl = sensitivities(
            self.model, parts, self._kl_of, lambda d, t: self.say("plan", d, t, "sensitivity of each part")
        )
        shapes = config.tensor_shapes()
        matrices = [shape for shape in shapes.values() if len(shape) == 2]
        low, high = (sum(format_bytes(f, (s[0], s[1])) for s in matrices) for f in (LOW, HIGH))
        rest = predict_bytes(self.model, candidates(config)[0], self.bench.lengths.context).weights_bytes - high
        targets = [low + (high - low) * share for share in _TARGETS]
        for limit in self.limits:
            if limit.metric == "weights_bytes":
                most = limit.threshold(self.baseline.value("weights_bytes")) - rest
                targets = [min(target, most) for target in targets] + [most]
        found = (allocation(config, parts, kl, target, seed=self.seed) for target in sorted(set(targets), reverse=True))
        unique = {recipe.hash: recipe for recipe in found if recipe is not None}
        return list(unique.values())

    def _kl_of(self, model: Model) -> float:
        engine = self.bench.open(model)
        try:
            return self.bench.quality(engine, "select")["kl_mean"].value or 0.0
        finally:
            engine.close()
