"""The stored limits, measured again here and now: for CI after every fine-tune, and on the real device.

The artifact's report says what was promised and under which lengths and texts. Quality is measured on
the confirm part of the same texts (found again by path and checksum) or on texts given now. What is
relative to the unmodified model needs that model; without it, only relative bytes can be judged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trilemma.core.errors import CheckpointError, DataError, InputError
from trilemma.core.measurement import Measurement
from trilemma.core.recipe import Recipe
from trilemma.core.results import Conditions, OptimizeReport, read_report
from trilemma.core.trial import Trial
from trilemma.core.verdict import Verdict
from trilemma.data.documents import read_documents
from trilemma.data.split import split_documents
from trilemma.data.text_source import read_sources
from trilemma.data.windows import TokenSet, make_windows
from trilemma.formats.artifact import load_any, read_artifact
from trilemma.model.checkpoint import model_hash
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.search.confirm import confirm_trial
from trilemma.search.deadline import Deadline
from trilemma.search.judge import EXIT_CODES, is_quality, judge_trial, outcome_of
from trilemma.search.progress import Progress, ProgressCallback, silent
from trilemma.search.texts import describe_files
from trilemma.search.workbench import Lengths, Workbench

REPORT_FILE = "report.json"
DEFAULT_LIMIT_S = 300.0
_BYTES = ("weights_bytes", "artifact_bytes", "engine_memory_bytes", "peak_memory_bytes", "kv_bytes_per_token")


@dataclass(frozen=True)
class CheckResult:
    """One verdict per stored limit, on this machine. exit_code: 0 all PASS, 3 a FAIL, 4 INCONCLUSIVE."""

    verdicts: tuple[Verdict, ...]
    exit_code: int
    trial: Trial
    notes: tuple[str, ...] = ()


def check(
    path: str | Path,
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    original: str | Path | None = None,
    threads: int | None = None,
    accept_estimates: bool | None = None,
    progress: ProgressCallback | None = None,
) -> CheckResult:
    """Measure the limits of an artifact that `optimize` wrote, again.

    Args:
        path: the artifact folder.
        data: texts to measure quality on, all of them; by default the confirm part of the original texts.
        original: the unmodified model, when it is no longer where the report says.
        threads: by default as many as were used then, where this machine has them.
        accept_estimates: by default as it was then.

    Raises:
        CheckpointError: the artifact is damaged.
        InputError: there is no report, or it can not be read.
    """
    folder, tell = Path(path), progress or silent
    deadline = Deadline(DEFAULT_LIMIT_S)
    report = _read(folder)
    conditions = report.conditions or Conditions(context=512, prompt_tokens=128, output_tokens=48, repetitions=5)
    tell(Progress("load", 0, 1, "opening the artifact", None))  # every tensor's checksum is verified as it is read
    model, notes = read_artifact(folder), list[str]()
    base = _original(report, original, notes)
    lengths = Lengths(**conditions.model_dump(include={"context", "prompt_tokens", "output_tokens", "repetitions"}))
    with tempfile.TemporaryDirectory(prefix="trilemma-check-") as scratch:

        def step(done: int, total: int, what: str) -> None:
            tell(Progress("check", done, total, what, None))

        bench = Workbench(
            base or model, lengths, Path(scratch), "", report.runtime, threads, step, device=conditions.device,
            duty=conditions.duty,
        )  # fmt: skip
        with bench:
            quality = [limit for limit in report.limits if is_quality(limit.metric)]
            if quality and base is not None:
                token_set = _token_set(report, conditions, model, data, notes)
                if token_set is not None:
                    bench.refer("confirm", token_set)
            engine = bench.open(model)
            try:
                chosen = Trial(name=report.decision.chosen or folder.name, recipe=_recipe(report), status="measured")
                trial = confirm_trial(bench, chosen, model, engine, report.limits, report.baseline, deadline)
            finally:
                engine.close()
    if base is None:
        trial = trial.model_copy(update={"paired_baseline": _stored_bytes(report)})
    against = report.baseline if base is not None else _without_times(report.baseline)
    accept = conditions.accept_estimates if accept_estimates is None else accept_estimates
    verdicts = judge_trial(trial, report.limits, against, accept_estimates=accept)
    return CheckResult(verdicts, EXIT_CODES[outcome_of(verdicts)], trial, tuple(notes))


def _read(folder: Path) -> OptimizeReport:
    file = folder / REPORT_FILE
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no folder. Give the output folder of `trilemma optimize`.")
    if not file.is_file():
        raise InputError(
            f"'{folder}' has no {REPORT_FILE}, so nothing says which limits to check. "
            "Give the output folder of `trilemma optimize`."
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Can not read '{file}': {error}. Make it again with `trilemma optimize`.") from None
    return read_report(text)


def _recipe(report: OptimizeReport) -> Recipe:
    return report.confirmed.recipe if report.confirmed is not None else report.baseline.recipe


def _original(report: OptimizeReport, given: str | Path | None, notes: list[str]) -> Model | None:
    """The unmodified model, where it can be found and is still the same."""
    place = given or report.model
    try:
        found = load_any(place)
    except (CheckpointError, InputError) as error:
        if given is not None:
            raise
        notes.append(f"the unmodified model was not found ({error}); say where it is with --original")
        return None
    if model_hash(found) != report.model_hash:
        text = f"'{place}' is not the model that the report was made from (hash {report.model_hash})"
        if given is not None:
            raise InputError(f"{text}. Give that one, or run `trilemma optimize` again.")
        notes.append(text)
        return None
    return found


def _token_set(
    report: OptimizeReport,
    conditions: Conditions,
    model: Model,
    data: str | Path | Sequence[str | Path] | None,
    notes: list[str],
) -> TokenSet | None:
    """The confirm part of the stored texts, or all of the texts given now."""
    assert model.path is not None
    tokenizer = Tokenizer.load(model.path)
    if data:
        paths = [data] if isinstance(data, str | Path) else list(data)
        documents = read_documents(paths, prepare=conditions.prepare, render=tokenizer.transcript)
    else:
        stored = [Path(item.path) for item in report.data_files]
        try:
            same = bool(stored) and describe_files(stored) == report.data_files
        except OSError:
            same = False
        if not same:
            notes.append("the texts of the report are gone or have changed; give text with --data to measure quality")
            return None
        read = read_documents(read_sources(stored), prepare=conditions.prepare, render=tokenizer.transcript)
        documents = split_documents(read, conditions.seed).confirm
    if not documents:
        raise DataError("The texts hold no documents.")
    return make_windows(
        documents,
        tokenizer.encode_plain,
        conditions.context,
        conditions.confirm_tokens or None,
        decode=tokenizer.decode,
    )


def _stored_bytes(report: OptimizeReport) -> dict[str, Measurement]:
    found = report.baseline.measurements
    return {metric: found[metric] for metric in _BYTES if metric in found}


def _without_times(baseline: Trial) -> Trial:
    """Times of another moment or machine are no baseline for this one."""
    kept = {metric: item for metric, item in baseline.measurements.items() if metric in _BYTES}
    return baseline.model_copy(update={"measurements": kept})
