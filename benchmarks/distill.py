"""A student that learns from its teacher beside the same student that learns from the text alone, for equal time.

    python benchmarks/distill.py --data TRAIN.txt --valid VALID.txt --prepare book --seconds 180

Both begin from the same cut and see the same windows in the same order; time is processor time of one thread,
the teacher's part included, so that other programs do not decide. The distilled student runs first; the other one
then gets as many steps as fit into what that really took, and five per cent more. One learning rate may be given
to each. Quality is measured on the validation text by the native engine, paired over documents.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer

from trilemma.core.measurement import Measurement
from trilemma.core.quantity import format_percent
from trilemma.data.documents import read_documents
from trilemma.formats.artifact import load_any
from trilemma.measure.quality.evaluate import build_reference, read_token_set
from trilemma.measure.quality.figures import TokenScores, score, summarize
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions
from trilemma.techniques.calibration_text import calibration_windows
from trilemma.techniques.distill.heal import Lesson
from trilemma.techniques.distill.student import DistillSettings, all_parameters, cut_student, describe_cut
from trilemma.techniques.technique import Build
from trilemma.techniques.training import train

_TEXT_BONUS = 1.05
_PROBES = 6


@dataclass(frozen=True)
class Trained:
    """One student with what it took."""

    name: str
    model: Model
    steps: int
    cpu_s: float
    wall_s: float


def main(
    data: Annotated[list[Path], typer.Option(help="text to learn from")],
    valid: Annotated[list[Path], typer.Option(help="text to measure on")],
    teacher: Annotated[str, typer.Option(help="model to learn from")] = "examples/models/hearth-7m",
    shrink: Annotated[float, typer.Option(help="share of the weights inside layers that goes")] = 0.5,
    seconds: Annotated[float, typer.Option(help="processor seconds of training for each")] = 180.0,
    learning_rate: Annotated[float, typer.Option(help="of the distilled student")] = 2e-3,
    text_learning_rate: Annotated[float, typer.Option(help="of the other one")] = 1e-3,
    teacher_weight: Annotated[float, typer.Option(help="of the teacher against the text")] = 1.0,
    precision: Annotated[str, typer.Option(help="f32 or bf16, of both")] = "f32",
    prepare: Annotated[str, typer.Option(help="book or none")] = "none",
    windows: Annotated[int, typer.Option(help="training windows at most")] = 20_000,
    eval_tokens: Annotated[int, typer.Option(help="tokens of validation text")] = 30_000,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    jsonl: Annotated[Path | None, typer.Option(help="append the result as one JSON line")] = None,
) -> None:
    """Train both, measure both, print the paired result."""
    torch.set_num_threads(1)
    how: Literal["none", "book"] = "book" if prepare == "book" else "none"
    model = load_any(teacher)
    common = {"shrink": shrink, "precision": precision}
    distilled = DistillSettings.model_validate(
        {**common, "learning_rate": learning_rate, "teacher_weight": teacher_weight}
    )
    alone = DistillSettings.model_validate({**common, "learning_rate": text_learning_rate, "teacher_weight": 0.0})
    assert model.path is not None
    tokenizer = Tokenizer.load(model.path)
    found, _ = calibration_windows(
        read_documents(data, prepare=how), tokenizer, distilled.context, seed=seed, part="all", prepare=how,
        windows=windows,
    )  # fmt: skip
    build = Build(calibration=found, seed=seed, threads=1, original=model)
    start = cut_student(model, distilled, build)
    one = trained("distilled", start, model, distilled, build, seconds)
    other = trained("text alone", start, model, alone, build, one.cpu_s * _TEXT_BONUS)
    rows = measured(model, [Trained("start", start, 0, 0.0, 0.0), one, other], valid, how, eval_tokens)
    print(f"{all_parameters(start.config) / 1e6:.2f}M of {all_parameters(model.config) / 1e6:.2f}M parameters; "
          f"{describe_cut(model.config, start.config)}; {found.shape[0]} windows of {found.shape[1]}\n")  # fmt: skip
    print("| student | steps | processor s | wall s | perplexity | KL to teacher | beside text alone |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['steps']} | {row['cpu_s']:.0f} | {row['wall_s']:.0f} | {row['perplexity']:.2f} | "
            f"{row['kl']:.4f} | {row['paired']} |"
        )
    if jsonl is not None:
        with jsonl.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"benchmark": "distill", "teacher": teacher, "seconds": seconds, "rows": rows}) + "\n"
            )


def trained(
    name: str, start: Model, teacher: Model, settings: DistillSettings, build: Build, seconds: float
) -> Trained:
    """Train for about so many processor seconds; the steps are planned from a few timed ones."""
    pace = _cpu_per_step(Lesson(start, teacher, settings.model_copy(update={"steps": _PROBES + 1}), build))
    settings = settings.model_copy(update={"steps": max(1, int(seconds / pace))})
    lesson = Lesson(start, teacher, settings, replace(build, progress=None))
    cpu, wall = time.process_time(), time.monotonic()
    learned = lesson.learn(name)
    return Trained(name, learned, settings.steps, time.process_time() - cpu, time.monotonic() - wall)


def _cpu_per_step(lesson: Lesson) -> float:
    moments: list[float] = []
    train(
        lesson.decoder, lesson.batches, lesson.loss(), lesson.training,
        progress=lambda _: moments.append(time.process_time()),
    )  # fmt: skip
    return median(after - before for before, after in pairwise(moments))


def measured(
    teacher: Model, students: list[Trained], valid: list[Path], prepare: Literal["none", "book"], tokens: int
) -> list[dict[str, Any]]:
    """Perplexity and KL of each, and perplexity paired to the student trained on text alone (the last one)."""
    token_set = read_token_set(teacher, valid, min(512, teacher.config.max_context), tokens, prepare)
    options = EngineOptions(max_context=token_set.context)
    with tempfile.TemporaryDirectory() as folder:
        reference = build_reference(teacher, token_set, folder, options=options)
        scores: list[TokenScores] = []
        for student in students:
            engine = open_engine(student.model, options=options)
            scores.append(score(engine, reference))
            engine.close()
        rows = []
        for student, own in zip(students, scores, strict=True):
            to_teacher = summarize(own, reference.token_set, reference.nll, "teacher")
            paired = summarize(own, reference.token_set, scores[-1].nll, "text alone")["ppl_increase"]
            rows.append({
                "name": student.name, "steps": student.steps, "cpu_s": student.cpu_s, "wall_s": student.wall_s,
                "perplexity": to_teacher["perplexity"].value, "kl": to_teacher["kl_mean"].value,
                "paired": _words(paired), "token_set": token_set.hash,
            })  # fmt: skip
        return rows


def _words(paired: Measurement) -> str:
    if not paired.value:
        return "—"
    low, high = paired.ci95 or (float("nan"), float("nan"))
    edges = f"{format_percent(low, signed=True)} to {format_percent(high, signed=True)}"
    return f"{format_percent(paired.value, signed=True)} perplexity [{edges}]"


if __name__ == "__main__":
    typer.run(main)
