"""The last look at the chosen model: text that nobody has seen, fresh timings, answers side by side.

Timings and text both grow until every limit on them is settled, at a few looks that are fixed before. Each look
is a chance to err: three looks with 95% intervals would err in 11%, a look after every repetition in 19%. So the
intervals are widened by a factor that brings all looks together back to 5% (Pocock 1977, Biometrika 64).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count

from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.results import Answer, ByteRow
from trilemma.core.trial import Trial
from trilemma.data.windows import TokenSet
from trilemma.formats.pack import format_bytes
from trilemma.measure.energy.sensors import find_sensors
from trilemma.model.cost import bytes_by_role, parameters_by_role, role_of
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime.engine import Engine, SamplingSettings
from trilemma.search.deadline import Deadline
from trilemma.search.judge import LOOKS_MARGIN, TAKEN_S, is_quality, judge_trial
from trilemma.search.workbench import Measurements, Workbench

ANSWER_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 10, 16, 40
TIME_LOOKS = (9, 16, 30)  # repetitions after which limits on times are judged
TIME_MARGIN = 1.30  # for intervals of a median; simulated, benchmarks/verdicts.py measures the outcome
TEXT_MARGINS = (1.0, 1.12, 1.18)  # for one look, and when text doubles once or twice
ENERGY_S = 40.0  # windows long enough for a counter, of both models; not for a search of half a minute
TIME_METRICS = ("ttft_s", "tpot_s", "itl_s", "itl_p99_s", "prefill_tokens_per_s", "decode_tokens_per_s")


def confirm_trial(
    bench: Workbench,
    chosen: Trial,
    model: Model,
    engine: Engine,
    limits: Sequence[Limit],
    baseline: Trial,
    deadline: Deadline,
    texts: Sequence[TokenSet] = (),
) -> Trial:
    """The chosen trial measured afresh; until every limit is settled, or text or time is out.

    Args:
        bench, chosen, model, engine: what measures, and what is measured.
        limits, baseline: what a measurement is judged by.
        deadline: ends the sampling.
        texts: confirm text, each about twice the one before, at most `len(TEXT_MARGINS)`. Without it quality is
            measured once on what the bench refers to as 'confirm'.
    """
    if deadline.left_s > ENERGY_S and any(sensor.reason is None for sensor in find_sensors()):
        bench.with_energy_sensor = True
    timed = [limit for limit in limits if limit.metric in TIME_METRICS]

    rounds = count(TIME_LOOKS[0])  # counted here, as a hindered one may leave no sample

    def settled(ours: Measurements, theirs: Measurements) -> bool:
        if not timed or deadline.left_s <= 0:
            return True
        if next(rounds) not in TIME_LOOKS:
            return False
        probe = chosen.model_copy(update={"measurements": _looked_at(ours), "paired_baseline": theirs})
        return all(v.outcome != "INCONCLUSIVE" for v in judge_trial(probe, timed, baseline))

    quality = _quality(bench, chosen, engine, limits, baseline, deadline, texts)
    began = time.monotonic()
    ours, theirs = bench.cost(model, engine, repetitions=TIME_LOOKS[0], settled=settled)
    if timed:
        ours = _looked_at(ours, time.monotonic() - began)
    if model.path is not None:
        ours |= bench.on_disk(model.path, peak=True)
    if bench.model.path is not None:
        theirs |= bench.on_disk(bench.model.path, peak=True)
    status = "baseline" if chosen.status == "baseline" else "measured"
    return chosen.model_copy(update={"status": status, "measurements": ours | quality, "paired_baseline": theirs})


def _quality(
    bench: Workbench, chosen: Trial, engine: Engine, limits: Sequence[Limit], baseline: Trial, deadline: Deadline,
    texts: Sequence[TokenSet],
) -> Measurements:  # fmt: skip
    """Quality on the first text, and on larger ones while a limit on it is open and the time allows."""
    limited = [limit for limit in limits if is_quality(limit.metric)]
    margin = TEXT_MARGINS[len(texts) - 1] if texts and limited else 1.0
    found: Measurements = {}
    for token_set in texts or (None,):
        began = time.monotonic()
        if token_set is not None:
            bench.refer("confirm", token_set)
        found = bench.quality(engine, "confirm")
        taken_s = time.monotonic() - began
        found = {name: _stated(item, margin, taken_s) for name, item in found.items()}
        probe = chosen.model_copy(update={"measurements": found})
        is_open = any(v.outcome == "INCONCLUSIVE" for v in judge_trial(probe, limited, baseline))
        if not is_open or not deadline.allows(2 * taken_s):
            break
    return found


def _looked_at(times: Measurements, taken_s: float = 0.0) -> Measurements:
    return {name: _stated(item, TIME_MARGIN, taken_s) if name in TIME_METRICS else item for name, item in times.items()}


def _stated(item: Measurement, margin: float, taken_s: float) -> Measurement:
    """The same, with how much wider its interval is to be judged, and the seconds it took."""
    said: dict[str, str | int | float] = {TAKEN_S: round(taken_s, 3)} if taken_s else {}
    if margin > 1:
        said[LOOKS_MARGIN] = margin
    return item.model_copy(update={"conditions": {**item.conditions, **said}})


def answers(
    original: Engine, chosen: Engine, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]
) -> tuple[Answer, ...]:
    """Both models continue each prompt greedily; the ones that part earliest come first."""
    settings = SamplingSettings(max_tokens=ANSWER_TOKENS)
    found = []
    for prompt in prompts:
        ours, theirs = original.generate(prompt, settings).tokens, chosen.generate(prompt, settings).tokens
        pairs = zip(ours, theirs, strict=False)
        differs = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        if differs is None and len(ours) != len(theirs):
            differs = min(len(ours), len(theirs))
        found.append(
            Answer(
                prompt=tokenizer.decode(list(prompt)), original=tokenizer.decode(ours), chosen=tokenizer.decode(theirs),
                first_difference=differs,
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda a: ANSWER_TOKENS if a.first_difference is None else a.first_difference))


def byte_rows(original: Model, chosen: Model) -> tuple[ByteRow, ...]:
    """Bytes of each role before and after, with the formats in use."""
    before = bytes_by_role(original.config, original.format_of, format_bytes)
    after = bytes_by_role(chosen.config, chosen.format_of, format_bytes)
    counts = parameters_by_role(original.config)
    return tuple(
        ByteRow(
            role=role, parameters=counts[role],
            original_format=_formats(original, role), original_bytes=before[role],
            chosen_format=_formats(chosen, role), chosen_bytes=after[role],
        )
        for role in counts
        if counts[role]
    )  # fmt: skip


def _formats(model: Model, role: str) -> str:
    shapes = model.config.tensor_shapes()
    names = [name for name, shape in shapes.items() if role_of(name) == role and len(shape) == 2]
    return ", ".join(dict.fromkeys(model.format_of(name) for name in names)) or "f32"
