"""The main job: limits in, a smaller measured model and a reasoned choice out.

    load -> split the texts -> measure the unmodified model -> drop recipes by arithmetic -> build and
    measure the rest, the promising first -> time the leaders side by side -> front -> choose on the
    select text -> confirm -> write

Every finished trial is kept beside the output, so an interrupted search goes on where it stopped; the
output folder itself appears whole at the end, or not at all.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trilemma.core.device import load_device
from trilemma.core.duty import DutyCycle
from trilemma.core.environment import cpu_name
from trilemma.core.errors import DataError, InputError
from trilemma.core.limit import Limit
from trilemma.core.results import OptimizeReport
from trilemma.data.documents import Prepare
from trilemma.formats.artifact import (
    check_output,
    read_artifact,
    replace_folder,
    write_artifact,
)
from trilemma.measure.energy.build_cost import BuildMeter
from trilemma.model.checkpoint import model_hash
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.search.conclude import conclude
from trilemma.search.deadline import Deadline, parse_time
from trilemma.search.decide import objective_for
from trilemma.search.explore import Exploration
from trilemma.search.journal import Journal
from trilemma.search.plan import MEASURED, plan_lengths, plan_text, prefill_rate, require_measurable
from trilemma.search.progress import Progress, ProgressCallback, silent
from trilemma.search.result import OptimizeResult
from trilemma.search.run_off import plan_run_off, run_off
from trilemma.search.searchable import load_searchable
from trilemma.search.texts import read_texts
from trilemma.search.workbench import Workbench

Paths = str | Path | Sequence[str | Path]


def optimize(
    model: Model | str | Path,
    *,
    limits: Sequence[Limit | str] = (),
    data: Paths | None = None,
    output: str | Path | None = None,
    time: str | float = "10m",
    minimize: str | None = None,
    runtime: str = "native",
    context: int | None = None,
    prepare: Prepare = "none",
    seed: int = 0,
    threads: int | None = None,
    accept_estimates: bool = False,
    device: str | Path | None = None,
    duty_cycle: str | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
    render: Callable[[OptimizeReport], str] | None = None,
    command: str = "",
) -> OptimizeResult:
    """Find the version of a model to ship within limits, and say how that is known.

    Args:
        model: a checkpoint folder, an artifact, or a hub id.
        limits: hard requirements, such as 'weights<=50%'; all must PASS.
        data: text files; split by document into calibrate, select and confirm.
        output: folder for the artifact, report.json and report.html; nothing is kept without it.
        time: effort, such as '5m'; at least the baseline and one candidate are measured. When it does not
            suffice for a decision, the outcome is INCONCLUSIVE and what was measured stays for the next run.
        minimize: metric to be best in within the limits; by default see `decide.objective_for`.
        context: tokens of the quality windows; 512 or the model's own by default.
        prepare: 'book' or 'none', see `data.read_documents`.
        accept_estimates: let an estimate PASS a limit.
        device: a profile (`core.device`), for limits on `battery_h`: predicted for it, not measured here.
        duty_cycle: how often that device answers, such as '200 tokens/h'; without a pause by default.
        force: replace an artifact that is at `output` already.
        progress: called with `search.progress.Progress`.
        render: makes report.html of the record; without it only report.json is written.

    Raises:
        InputError: a model, text, limit, time or output that can not be used; nothing is written then.
    """
    wanted = tuple(limit if isinstance(limit, Limit) else Limit.parse(limit) for limit in limits)
    objective = objective_for(wanted, minimize)
    every = (*wanted, *objective.implied)
    elsewhere = None if device is None else load_device(device)
    duty = _duty(device, duty_cycle)
    require_measurable(every, objective, MEASURED | ({"battery_h"} if elsewhere is not None else set()))
    deadline = Deadline(parse_time(time))
    target = None if output is None else check_output(output, force=force)
    loaded = load_searchable(model)
    key = model_hash(loaded)
    tell = progress or silent
    tell(Progress("texts", 0, 1, "reading and splitting the texts", deadline.left_s))
    assert loaded.path is not None
    lengths = plan_lengths(loaded.config, context)
    texts = read_texts(_paths(data), Tokenizer.load(loaded.path), lengths.context, seed, prepare)
    with _work_folder(target) as folder:

        def step(done: int, total: int, what: str) -> None:
            tell(Progress("measure", done, total, what, deadline.left_s))

        energy = any(
            "energy" in metric or metric == "power_w" for metric in (objective.metric, *(x.metric for x in every))
        )
        bench = Workbench(
            loaded, lengths, folder / "reference", key, runtime, threads, step, energy, device=elsewhere, duty=duty
        )
        with bench, BuildMeter() as meter:
            circumstances = {
                "model": key, "lengths": lengths, "runtime": runtime, "threads": bench.baseline.threads,
                "isa": bench.baseline.isa, "cpu": cpu_name(), "files": texts.files, "seed": seed, "prepare": prepare,
                "device": "" if elsewhere is None else elsewhere.model_dump_json(), "duty": duty_cycle,
                "energy": energy,
                "limits": sorted(limit.text for limit in every if limit.metric == "peak_memory_bytes"),
            }  # fmt: skip
            journal = Journal(
                folder, circumstances, deadline.limit_s,
                lambda: plan_text(prefill_rate(bench.baseline, lengths.context), deadline.limit_s, lengths.context),
            )  # fmt: skip
            search = Exploration(loaded, every, texts, bench, journal, deadline, tell, seed, threads, meter)
            search.measure_baseline()
            plan_run_off(search, objective.metric)
            search.measure_candidates()
            run_off(search, objective.metric)
            result = conclude(search, objective, name=_name(model), model_key=key, command=command,
                              accept_estimates=accept_estimates)  # fmt: skip
            if target is not None and result.best is not None:
                tell(Progress("write", 0, 1, str(target), deadline.left_s))
                result = _write(search, result, target, render)
        if not result.unfinished:
            journal.remove()
        return result


def _duty(device: str | Path | None, duty_cycle: str | None) -> DutyCycle | None:
    if duty_cycle is None:
        return None
    if device is None:
        raise InputError("A duty cycle is for battery hours of a device: give one with --device (or `device=`).")
    return DutyCycle.parse(duty_cycle)


def _paths(data: Paths | None) -> list[str | Path]:
    if not data:
        raise DataError(
            "A search needs text like that of your task, to calibrate, select and confirm on. Give it with --data FILE "
            "(.txt, .json or .jsonl; 60 or more documents make useful intervals)."
        )
    return [data] if isinstance(data, str | Path) else list(data)


def _name(model: Model | str | Path) -> str:
    return str(model.path) if isinstance(model, Model) else str(model)


@contextmanager
def _work_folder(target: Path | None) -> Iterator[Path]:
    """`<output>.search` stays after an interruption; without an output a folder that goes away."""
    if target is not None:
        yield target.with_name(target.name + ".search")
        return
    folder = Path(tempfile.mkdtemp(prefix="trilemma-search-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    search: Exploration, result: OptimizeResult, target: Path, render: Callable[[OptimizeReport], str] | None
) -> OptimizeResult:
    """Put the artifact with its evidence in place of the output, in one rename."""
    assert result.best is not None
    staged = search.journal.folder / "chosen"
    changed = result.best.status != "baseline"
    chosen = read_artifact(search.journal.artifact_folder(result.best.recipe)) if changed else search.model
    write_artifact(chosen, staged, result.best.recipe)
    (staged / "report.json").write_text(result.report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if render is not None:
        (staged / "report.html").write_text(render(result.report), encoding="utf-8")
    replace_folder(staged, target)
    return OptimizeResult(result.best, result.front, result.verdicts, result.report, result.exit_code, target)
