"""Where candidates are measured: the baseline stays open, references are cached, speeds are interleaved.

Left out: which candidates to measure and what to make of the numbers (`run.py`, `decide.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from trilemma.core.device import Device
from trilemma.core.duty import DutyCycle
from trilemma.core.measurement import Measurement
from trilemma.core.record import Record
from trilemma.data.windows import TokenSet
from trilemma.measure.energy.model_energy import model_energy
from trilemma.measure.energy.sensors import NoSensor, find_sensors
from trilemma.measure.memory.held import artifact_bytes, engine_memory, peak_memory
from trilemma.measure.quality.evaluate import build_reference
from trilemma.measure.quality.figures import Reference, evaluate
from trilemma.measure.timing.speed import SpeedRun
from trilemma.model.model import Model
from trilemma.runtime import open_engine
from trilemma.runtime.engine import Engine, EngineOptions
from trilemma.search.forecast import forecast_model

Measurements = dict[str, Measurement]
Step = Callable[[int, int, str], None]
Settled = Callable[[Measurements, Measurements], bool]

MOST_REPETITIONS = 30


class Lengths(Record):
    """Tokens of the quality windows and of the timed requests, and how often those are repeated."""

    context: int
    prompt_tokens: int
    output_tokens: int
    repetitions: int


@dataclass
class Workbench(AbstractContextManager["Workbench"]):
    """Measures models of one search under one set of conditions.

    Args:
        model: the unmodified model; its path is needed for peak memory.
        lengths: of windows and requests.
        folder: where the reference's log-probabilities are cached.
        model_key: identity of the unmodified model, under which they are found again.
        device, duty: for battery hours of a device that is not here.
    """

    model: Model
    lengths: Lengths
    folder: Path
    model_key: str
    runtime: str = "native"
    threads: int | None = None
    step: Step | None = None
    with_energy_sensor: bool = False
    device: Device | None = None
    duty: DutyCycle | None = None
    references: dict[str, Reference] = field(default_factory=dict)
    _baseline: Engine | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._baseline is not None:
            self._baseline.close()

    @property
    def baseline(self) -> Engine:
        if self._baseline is None:
            self._baseline = self.open(self.model)
        return self._baseline

    def open(self, model: Model) -> Engine:
        """An engine with room for the windows and for the timed requests."""
        room = max(self.lengths.context, self.lengths.prompt_tokens + self.lengths.output_tokens)
        options = EngineOptions(threads=self.threads, max_context=room)
        return open_engine(model, runtime=self.runtime, options=options)

    def refer(self, part: str, token_set: TokenSet) -> TokenSet:
        """Score a part with the unmodified weights in f32 arithmetic; returns the tokens that fitted."""
        made = build_reference(
            self.model, token_set, self.folder, runtime=self.runtime, options=EngineOptions(threads=self.threads),
            key=self.model_key, progress=self.step,
        )  # fmt: skip
        self.references[part] = made
        return made.token_set

    def quality(self, engine: Engine, part: str) -> Measurements:
        """Perplexity, KL and agreement on a part that `refer` has seen; nothing when there is no text."""
        if part not in self.references:
            return {}
        return evaluate(engine, self.references[part], progress=self.step)

    def cost(
        self, model: Model, engine: Engine, *, repetitions: int | None = None, settled: Settled | None = None
    ) -> tuple[Measurements, Measurements]:
        """Memory, speed and energy of a candidate, and those of the baseline from the same interleaved run.

        Args:
            repetitions: timed requests of each.
            settled: asked after them whether more are pointless; up to `MOST_REPETITIONS`.
        """
        pair = {"candidate": engine, "baseline": self.baseline}
        if engine is self.baseline:
            pair = {"candidate": engine}
        run = SpeedRun(pair, prompt_tokens=self.lengths.prompt_tokens, output_tokens=self.lengths.output_tokens)
        wanted = repetitions or self.lengths.repetitions
        try:
            run.warm_up()
            for turn in range(MOST_REPETITIONS):
                run.repeat()
                self._tell(turn + 1, wanted, "speed")
                if turn + 1 < wanted:
                    continue
                now = run.results()
                if settled is None or settled(now["candidate"], now.get("baseline", now["candidate"])):
                    break
            found = run.results()
        finally:
            run.close()
        ours = found["candidate"] | engine_memory(engine)
        theirs = found.get("baseline", found["candidate"]) | engine_memory(self.baseline)
        ours |= self.energy(model, engine, ours)
        if engine is not self.baseline:
            theirs |= self.energy(self.model, self.baseline, theirs)
        return ours, theirs

    def race(self, engines: Mapping[str, Engine], repetitions: int) -> tuple[dict[str, Measurements], Measurements]:
        """Speeds of several candidates and of the baseline, all from one interleaved run."""
        lengths = self.lengths
        run = SpeedRun(
            {"": self.baseline, **engines}, prompt_tokens=lengths.prompt_tokens, output_tokens=lengths.output_tokens
        )
        try:
            run.warm_up()
            for turn in range(repetitions):
                run.repeat()
                self._tell(turn + 1, repetitions, "speed side by side")
            found = run.results()
        finally:
            run.close()
        theirs = found.pop("")
        return found, theirs

    def energy(self, model: Model, engine: Engine, times: Mapping[str, Measurement]) -> Measurements:
        """By counter where there is one and energy is asked for (it takes seconds), else estimated from the times.

        With a device that is not here, also the hours that its battery would give.
        """
        sensors = find_sensors()
        if not self.with_energy_sensor and any(sensor.reason is None for sensor in sensors):
            unread = "a counter is here; it is read when energy is limited or minimised, and for the confirm run"
            sensors = [NoSensor("counter", "package", unread)]
        lengths = self.lengths
        found = model_energy(
            model, engine, times, prompt_tokens=lengths.prompt_tokens, output_tokens=lengths.output_tokens,
            sensors=sensors,
        )  # fmt: skip
        if self.device is not None:
            there = forecast_model(
                model, self.device, prompt_tokens=lengths.prompt_tokens, output_tokens=lengths.output_tokens,
                duty=self.duty,
            )  # fmt: skip
            found["battery_h"] = there.measurements["battery_h"]
        return found

    def on_disk(self, path: Path, *, peak: bool) -> Measurements:
        """Bytes on disk, and on request the peak of a fresh process."""
        found = {"artifact_bytes": artifact_bytes(path)}
        if peak:
            lengths = self.lengths
            options = EngineOptions(threads=self.threads, max_context=lengths.prompt_tokens + lengths.output_tokens)
            found["peak_memory_bytes"] = peak_memory(
                path, prompt_tokens=lengths.prompt_tokens, output_tokens=lengths.output_tokens,
                runtime=self.runtime, options=options,
            )  # fmt: skip
        return found

    def _tell(self, done: int, total: int, what: str) -> None:
        if self.step is not None:
            self.step(done, max(done, total), what)
