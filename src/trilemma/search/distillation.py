"""`trilemma distill` from end to end: texts, cut, plan, training, artifact, and what the student is worth.

The recipe that it leaves is one `distill` step with its number of steps; `compress --recipe` replays it on the
same text. What takes long is kept in a folder beside the output until the artifact is there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError, RecipeError
from trilemma.core.measurement import Measurement
from trilemma.core.recipe import Calibration, Recipe, Step
from trilemma.core.record import Record
from trilemma.data.documents import Document, Prepare, read_documents
from trilemma.data.split import hold_out
from trilemma.data.text_source import read_sources
from trilemma.data.windows import TokenSet, make_windows
from trilemma.formats.artifact import check_output, load_any, read_artifact, weights_bytes, write_artifact
from trilemma.measure.energy.build_cost import BuildMeter
from trilemma.measure.quality.evaluate import build_reference
from trilemma.measure.quality.figures import likelihood, score, summarize
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions
from trilemma.search.deadline import parse_time
from trilemma.techniques import TECHNIQUES
from trilemma.techniques.calibration_text import calibration_windows
from trilemma.techniques.distill.heal import Lesson
from trilemma.techniques.distill.student import (
    Distill,
    DistillSettings,
    all_parameters,
    cut_student,
    describe_cut,
    layer_parameters,
)
from trilemma.techniques.technique import Build, read_settings
from trilemma.techniques.torch_device import check_device, within_memory
from trilemma.techniques.training import CURVE_FILE, CurvePoint

Progress = Callable[[int, int, str], None]

QUALITY_TOKENS = 20_000
VALIDATION_TOKENS = 4_096
_OVERHEAD = 1.06  # validation, checkpoints and writing, as a part of the training's time
_MOST_WINDOWS = 1 << 20


class QualityRow(Record):
    """One of 'teacher', 'student before', 'student after' on the held-out documents."""

    name: str
    measurements: dict[str, Measurement]


class DistillReport(Record):
    """What `distill` did. Parameters are counted, `cut` says in words what went."""

    schema_version: int = 1
    teacher: str
    output: str
    recipe: Recipe
    cut: str
    teacher_parameters: int
    student_parameters: int
    teacher_layer_parameters: int
    student_layer_parameters: int
    weights_bytes: int
    steps: int
    tokens: int
    training_windows: int
    held_out_documents: int
    build: dict[str, Measurement]
    rows: tuple[QualityRow, ...]
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class _Texts:
    tokenizer: Tokenizer
    windows: NDArray[np.int32]
    record: Calibration
    held_out: TokenSet
    validation: NDArray[np.int32]


def distill(
    teacher: Model | str | Path,
    output: str | Path,
    *,
    data: str | Path | Sequence[str | Path],
    shrink: float = 0.5,
    layers: int | None = None,
    time: str | float = "10m",
    settings: dict[str, Any] | None = None,
    prepare: Prepare = "none",
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> DistillReport:
    """Cut a student out of a teacher and train it on the teacher's answers.

    A stopped run goes on when it is called again with the same arguments.

    Args:
        teacher: a checkpoint, an artifact with floating-point weights, or a hub id; it stays as it is.
        output: folder of the student, an artifact that everything else takes; beside it `<output>.training` while it
            is made.
        data: text files; a twentieth of the documents is held out and measured on.
        shrink: share of the weights inside layers that goes.
        layers: how many layers stay; all by default, since width is the better cut.
        time: for cutting and training together, the teacher's part included.
        settings: of the technique `distill`, over its defaults; with `steps` the time decides nothing.
        device: where torch trains: cpu, cuda, cuda:1. Quality is measured on this host's CPU.

    Returns:
        What was cut, the recipe, what building took, the learning curve, and quality before and after.

    Raises:
        InputError: a model, text, time, setting or device that can not be used; nothing is written then.
        StoppedError: the user stopped it; what was done is kept.
    """
    limit_s = parse_time(time)
    chosen = read_settings(TECHNIQUES.get("distill")(), {"shrink": shrink, "layers": layers, **(settings or {})})
    assert isinstance(chosen, DistillSettings)
    check_device(device)
    check_output(output, force=force)
    model = load_any(teacher) if isinstance(teacher, str | Path) else teacher
    if model.path is None or getattr(model.source, "random", False):
        raise CheckpointError(f"'{teacher}' has no trained weights and tokenizer; a teacher needs both.")
    if (reason := Distill().supports(model.config)) is not None:
        raise RecipeError(f"No student can be cut out of this model: {reason}.")
    texts = _read_texts(model, [data] if isinstance(data, str | Path) else data, chosen, prepare, seed)
    work = Path(output).with_name(Path(output).name + ".training")
    build = Build(texts.windows, seed, threads, device, original=model, work=work, progress=progress)
    with BuildMeter() as meter, within_memory(device, "distillation"):
        before, lesson = _prepare_lesson(model, chosen, build, texts, limit_s, "steps" in (settings or {}))
        chosen = lesson.settings
        learned = lesson.learn("distill")
    recipe = Recipe(
        name=f"distill{shrink * 100:.0f}", seed=seed, calibration=texts.record,
        steps=(Step(technique="distill", settings=chosen.model_dump(mode="json")),),
    )  # fmt: skip
    write_artifact(learned, output, recipe)
    made = read_artifact(Path(output))
    _keep_curve(lesson, Path(output))
    rows = _quality(model, before, made, texts.held_out, threads, progress)
    assert lesson.result is not None
    report = DistillReport(
        teacher=str(teacher) if isinstance(teacher, str | Path) else model.config.family, output=str(output),
        recipe=recipe, cut=describe_cut(model.config, made.config),
        teacher_parameters=all_parameters(model.config), student_parameters=all_parameters(made.config),
        teacher_layer_parameters=layer_parameters(model.config), student_layer_parameters=layer_parameters(made.config),
        weights_bytes=weights_bytes(made), steps=lesson.result.step, tokens=lesson.result.tokens,
        training_windows=len(lesson.batches.windows), held_out_documents=texts.held_out.document_count,
        build=_with_seconds(meter.results(), lesson.result.seconds), rows=rows, curve=tuple(lesson.result.curve),
    )  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)
    return report


def _read_texts(
    model: Model, data: Sequence[str | Path], settings: DistillSettings, prepare: Prepare, seed: int
) -> _Texts:
    assert model.path is not None
    tokenizer = Tokenizer.load(model.path)
    sources = read_sources(data)
    documents = read_documents(sources, prepare=prepare, render=tokenizer.transcript)
    training, held_out = hold_out(documents, seed)
    context = min(settings.context, model.config.max_context)
    windows, record = calibration_windows(
        training, tokenizer, context, seed=seed, part="train", prepare=prepare, windows=_MOST_WINDOWS, sources=sources
    )
    validation = _validation_windows(held_out, tokenizer, context, seed)
    tokens = make_windows(
        held_out, tokenizer.encode_plain, min(512, model.config.max_context), QUALITY_TOKENS, decode=tokenizer.decode
    )
    return _Texts(tokenizer, windows, record, tokens, validation)


def _validation_windows(
    held_out: Sequence[Document], tokenizer: Tokenizer, context: int, seed: int
) -> NDArray[np.int32]:
    count = max(1, VALIDATION_TOKENS // context)
    return calibration_windows(
        held_out, tokenizer, context, seed=seed, part="all", prepare="none", windows=count
    )[0]  # fmt: skip


def _prepare_lesson(
    model: Model, settings: DistillSettings, build: Build, texts: _Texts, limit_s: float, fixed_steps: bool
) -> tuple[Model, Lesson]:
    """The student before training and its lesson; what a stopped run with the same arguments decided is taken over."""
    assert build.work is not None
    asked = f"{settings.model_dump_json()} {texts.record.sha256} {build.seed} {limit_s} {fixed_steps} {model.path}"
    note, cut = build.work / "plan.json", build.work / "student"
    plan = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if plan.get("asked") != asked:
        shutil.rmtree(build.work, ignore_errors=True)
        began = clock.monotonic()
        student = cut_student(model, settings, build)
        write_artifact(student, cut, Recipe(name="cut"))
        steps, precision = settings.steps, settings.precision
        if not fixed_steps:
            if build.progress is not None:
                build.progress(0, 0, "timing a few steps")
            pace = Lesson(read_artifact(cut), model, settings, replace(build, work=None)).seconds_per_step()
            left = limit_s - (clock.monotonic() - began)
            steps = max(1, int(left / (pace * _OVERHEAD)))
        plan = {"asked": asked, "steps": steps, "precision": precision}
        note.write_text(json.dumps(plan), encoding="utf-8")
    student = read_artifact(cut)
    planned = settings.model_copy(update={"steps": plan["steps"], "precision": plan["precision"]})
    return student, Lesson(student, model, planned, build, held_out=texts.validation)


def _keep_curve(lesson: Lesson, output: Path) -> None:
    folder = lesson.folder("distill")
    if folder is not None and (folder / CURVE_FILE).is_file():
        shutil.copyfile(folder / CURVE_FILE, output / CURVE_FILE)


def _with_seconds(build: dict[str, Measurement], training_s: float) -> dict[str, Measurement]:
    """A resumed run counts the training of the runs before."""
    wall = build["build_s"]
    if wall.value is None or wall.value >= training_s:
        return build
    whole = Measurement.of("build_s", training_s, method="training of all runs, without cutting", scope="wall")
    return {**build, "build_s": whole}


def _quality(
    teacher: Model, before: Model, after: Model, tokens: TokenSet, threads: int | None, progress: Progress | None
) -> tuple[QualityRow, ...]:
    """Perplexity of all three, and divergence of the students from the teacher, on held-out documents."""
    options = EngineOptions(threads=threads, max_context=tokens.context)
    with tempfile.TemporaryDirectory(prefix="trilemma-reference-") as folder:
        reference = build_reference(teacher, tokens, folder, options=options, progress=progress)
        rows = [QualityRow(name="teacher", measurements=likelihood(reference.nll, reference.token_set))]
        for name, model in (("student before", before), ("student after", after)):
            engine = open_engine(model, options=options)
            try:
                found = score(engine, reference, progress)
            finally:
                engine.close()
            measured = summarize(found, reference.token_set, reference.nll, reference.engine_name)
            rows.append(QualityRow(name=name, measurements=measured))
    return tuple(rows)
