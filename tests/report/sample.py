"""A made-up but complete report, for tests of the page."""

from made_up_trials import ALL, BASELINE, INT4_G32, measured, trial
from trilemma.core.environment import Environment
from trilemma.core.limit import Limit
from trilemma.core.recipe import Recipe
from trilemma.core.results import (
    Answer,
    BenchReport,
    BenchRow,
    ByteRow,
    Conditions,
    DataFile,
    DataPart,
    Decision,
    OptimizeReport,
)
from trilemma.core.trial import Trial
from trilemma.search.decide import choose, objective_for
from trilemma.search.judge import judge_trial, outcome_of
from trilemma.search.sentence import ship

HERE = Environment(
    cpu="Made-up CPU",
    cores=2,
    memory_bytes=24_000_000_000,
    system="Linux",
    python="3.11.7",
    packages={"numpy": "2.0"},
    isa="avx512",
    threads=2,
    model_hash="abc123",
    recipe_hash="def456",
)


def sample(limits=("weights<=50%", "tpot<=90%", "ppl_increase<=2%"), **changes):
    given = [Limit.parse(text) for text in limits]
    objective = objective_for(given)
    crowd = [
        trial(f"W4A8-g{32 + i}", weights=4.4e6 + 2e4 * i, tpot=1e-3 + 5e-6 * i, kl=9e-3 * (1 + 0.02 * i), ppl=0.012)
        for i in range(6)
    ]
    trials = [*ALL[1:], *crowd, Trial(name="W4A8-g64-gptq", recipe=Recipe(), status="failed", reason="singular matrix")]
    choice = choose([BASELINE, *trials], given, objective, BASELINE)
    confirmed = choice.trial or INT4_G32
    verdicts = judge_trial(confirmed, given, BASELINE)
    fields = {
        "model": "examples/models/hearth-7m",
        "model_hash": "abc123",
        "objective": objective.text,
        "limits": tuple(given),
        "environment": HERE,
        "data": tuple(
            DataPart(name=n, documents=40, tokens=20480, text_bytes=90_000) for n in ("calibrate", "select", "confirm")
        ),
        "baseline": BASELINE,
        "trials": tuple(trials),
        "front": ("baseline", "W8A8", "W4A8-g32", "W4A8-g128"),
        "confirmed": confirmed,
        "verdicts": verdicts,
        "decision": Decision(
            sentence=ship(confirmed, BASELINE, verdicts, objective),
            chosen=confirmed.name,
            outcome=outcome_of(verdicts),
            alternatives=choice.alternatives,
        ),
        "answers": (
            Answer(
                prompt="The cat sat",
                original=" on the mat and slept.",
                chosen=" on the moon and sang.",
                first_difference=2,
            ),
            Answer(prompt="Once", original=" upon a time.", chosen=" upon a time.", first_difference=None),
        ),
        "bytes_by_role": (
            ByteRow(
                role="embedding",
                parameters=2_097_152,
                original_format="bf16",
                original_bytes=4_194_304,
                chosen_format="int8-g32",
                chosen_bytes=2_228_224,
            ),
            ByteRow(
                role="attention",
                parameters=1_179_648,
                original_format="bf16",
                original_bytes=2_359_296,
                chosen_format="int4-g32",
                chosen_bytes=663_552,
            ),
            ByteRow(
                role="ffn",
                parameters=3_538_944,
                original_format="bf16",
                original_bytes=7_077_888,
                chosen_format="int4-g32",
                chosen_bytes=1_990_656,
            ),
        ),
        "seconds": 43.2,
        "command": "trilemma optimize examples/models/hearth-7m -o OUT --data text.txt",
        "conditions": Conditions(context=512, prompt_tokens=128, output_tokens=32, repetitions=5),
        "data_files": (DataFile(path="text.txt", sha256="0" * 64),),
        "notes": ("the noise floor of KL is 1e-5",),
    }
    return OptimizeReport(**(fields | changes))


def sample_bench():
    rows = (
        BenchRow(
            model="SmolLM2-135M",
            parameters=134_515_008,
            random_weights=True,
            trial=trial("W4A8-g32", weights=76e6, tpot=4e-3, kl=0.5, ppl=9.0),
        ),
        BenchRow(
            model="hearth-7m",
            parameters=6_819_072,
            random_weights=False,
            trial=INT4_G32.model_copy(
                update={
                    "measurements": {
                        **INT4_G32.measurements,
                        "energy_j_per_output_token": measured(
                            "energy_j_per_output_token", 0.01, 0.004, source="estimated"
                        ),
                    }
                }
            ),
        ),
    )
    return BenchReport(environment=HERE, rows=rows, command="trilemma bench a b")
