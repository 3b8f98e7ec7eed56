"""The last look at the chosen model: text that nobody has seen, fresh timings, answers side by side."""

from __future__ import annotations

from collections.abc import Sequence

from trilemma.core.limit import Limit
from trilemma.core.results import Answer, ByteRow
from trilemma.core.trial import Trial
from trilemma.formats.pack import format_bytes
from trilemma.measure.energy.sensors import find_sensors
from trilemma.model.cost import bytes_by_role, parameters_by_role, role_of
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime.engine import Engine, SamplingSettings
from trilemma.search.deadline import Deadline
from trilemma.search.judge import judge_trial
from trilemma.search.workbench import Measurements, Workbench

ANSWER_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 10, 16, 40
CONFIRM_REPETITIONS = 9
ENERGY_S = 40.0  # windows long enough for a counter, of both models; not for a search of half a minute
TIME_METRICS = ("ttft_s", "tpot_s", "itl_s", "prefill_tokens_per_s", "decode_tokens_per_s")


def confirm_trial(
    bench: Workbench,
    chosen: Trial,
    model: Model,
    engine: Engine,
    limits: Sequence[Limit],
    baseline: Trial,
    deadline: Deadline,
) -> Trial:
    """The chosen trial measured afresh; timings go on until every limit on them is settled, or time is out."""
    if deadline.left_s > ENERGY_S and any(sensor.reason is None for sensor in find_sensors()):
        bench.with_energy_sensor = True
    timed = [limit for limit in limits if limit.metric in TIME_METRICS]

    def settled(ours: Measurements, theirs: Measurements) -> bool:
        if not timed or deadline.left_s <= 0:
            return True
        probe = chosen.model_copy(update={"measurements": ours, "paired_baseline": theirs})
        return all(v.outcome != "INCONCLUSIVE" for v in judge_trial(probe, timed, baseline))

    quality = bench.quality(engine, "confirm")
    ours, theirs = bench.cost(model, engine, repetitions=CONFIRM_REPETITIONS, settled=settled)
    if model.path is not None:
        ours |= bench.on_disk(model.path, peak=True)
    if bench.model.path is not None:
        theirs |= bench.on_disk(bench.model.path, peak=True)
    status = "baseline" if chosen.status == "baseline" else "measured"
    return chosen.model_copy(update={"status": status, "measurements": ours | quality, "paired_baseline": theirs})


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
