"""`trilemma run --cascade`: calibrate a cascade to a limit, keep it in a file, answer with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trilemma.runtime.cascade_record import CascadeRecord, CascadeRule
    from trilemma.runtime.engine import EngineOptions, SamplingSettings


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    cascade: str
    threshold: float | None
    limits: Sequence[str]
    data: Sequence[Path]
    prompts: int
    prepare: Literal["none", "book"]
    output: Path | None
    force: bool
    seed: int


def run_cascade(
    asked: Request,
    prompt: str | None,
    sampling: SamplingSettings,
    options: EngineOptions,
    stop: Sequence[str],
    *,
    chat: bool,
    json: bool,
) -> None:
    """Calibrate where limits are given, answer where there is a prompt; the exit code is that of the verdicts."""
    from trilemma.cli import console
    from trilemma.core.errors import InputError
    from trilemma.search.judge import EXIT_CODES, outcome_of

    if not asked.limits and prompt is None:
        raise InputError("There is nothing to do. Give a prompt, or --limit and --data to calibrate the cascade.")
    document: dict[str, object] = {}
    if asked.limits:
        record = _calibrate(asked, sampling, options)
        if record is None:
            if json:
                console.print_json({"calibration": None})
            raise typer.Exit(3)
        small, large, rule, code = record.small, record.large, record.rule, EXIT_CODES[outcome_of(record.verdicts)]
        document["calibration"] = record
        if not json:
            _show(record)
            if asked.output is not None:
                typer.echo(f"Kept in {asked.output}; answer with: trilemma run --cascade {asked.output} PROMPT")
    else:
        small, large, rule = _stored_or_given(asked)
        code = 0
    if prompt is not None:
        document |= _answer(small, large, rule, prompt, sampling, options, stop, chat=chat, json=json)
    if json:
        console.print_json(document)
    raise typer.Exit(code)


def _calibrate(asked: Request, sampling: SamplingSettings, options: EngineOptions) -> CascadeRecord | None:
    from trilemma.cli import console
    from trilemma.core.environment import command_line
    from trilemma.core.errors import OutputError
    from trilemma.search.cascade import calibrate_cascade

    if asked.output is not None and asked.output.exists() and not asked.force:
        raise OutputError(f"'{asked.output}' exists already. Give another path, or --force to replace it.")
    if asked.output is not None and not asked.output.absolute().parent.is_dir():
        raise OutputError(f"The folder of '{asked.output}' does not exist. Make it first.")
    small, large = _pair(asked.cascade)
    with console.progress("cascade") as update:
        record = calibrate_cascade(
            small, large, data=list(asked.data), limits=asked.limits, max_tokens=min(sampling.max_tokens, 48),
            prompts=asked.prompts, prepare=asked.prepare, seed=asked.seed, options=options, progress=update,
            command=command_line(),
        )  # fmt: skip
    if record is None:
        typer.echo(
            f"No threshold keeps {' and '.join(asked.limits)}: even the answers that {small} is surest of differ too "
            f"much from those of {large}. Use the large model alone, a better small one, or a wider limit.",
            err=True,
        )
        return None
    if asked.output is not None:
        record.write(asked.output, force=asked.force)
    return record


def _stored_or_given(asked: Request) -> tuple[str, str, CascadeRule]:
    """The models and the rule: from a record, whose models must still be the same, or from --threshold."""
    from trilemma.core.errors import InputError
    from trilemma.formats.artifact import load_any
    from trilemma.model.write import model_hash
    from trilemma.runtime.cascade_record import CascadeRecord, CascadeRule

    if "," in asked.cascade:
        small, large = _pair(asked.cascade)
        if asked.threshold is None:
            raise InputError(
                "No threshold says when the small model's answer is kept. Calibrate one with --limit "
                "'agreement>=95%' --data FILE -o cascade.json, or set --threshold yourself (0 keeps all, 1 hardly any)."
            )
        return small, large, CascadeRule(threshold=asked.threshold)
    if asked.threshold is not None:
        raise InputError("A cascade.json holds its own threshold. Leave --threshold out, or give SMALL,LARGE instead.")
    file = Path(asked.cascade)
    record = CascadeRecord.read(file)
    found = []
    for name, path, digest in (("small", record.small, record.small_hash), ("large", record.large, record.large_hash)):
        place = path if Path(path).exists() or not (file.parent / path).exists() else str(file.parent / path)
        if model_hash(load_any(place)) != digest:
            raise InputError(
                f"The {name} model '{place}' is not the one that '{file}' was calibrated with. Calibrate again."
            )
        found.append(place)
    return found[0], found[1], record.rule


def _answer(
    small: str, large: str, rule: CascadeRule, prompt: str, sampling: SamplingSettings, options: EngineOptions,
    stop: Sequence[str], *, chat: bool, json: bool,
) -> dict[str, object]:  # fmt: skip
    from trilemma.cli import console
    from trilemma.cli.run import write
    from trilemma.runtime.cascade import CascadeEngine, open_cascade

    with open_cascade(small, large, rule, options) as opened:
        answer = opened.complete(prompt, sampling, stop=stop, chat=chat, on_text=None if json else write)
        assert isinstance(opened.engine, CascadeEngine)
        done = opened.engine.last
    assert done is not None
    if not json:
        typer.echo("")
        console.stderr.print(f"{answer.summary()}; {done.summary(rule)}", style="dim", markup=False, soft_wrap=True)
    return {
        "text": answer.text, "finish_reason": answer.finish_reason, **answer.figures(), "answered_by": done.by,
        "confidence": done.confidence, "threshold": rule.threshold, "signal": rule.signal,
        "small_tokens": done.small_tokens, "small_s": done.small_s, "large_s": done.large_s,
    }  # fmt: skip


def _pair(text: str) -> tuple[str, str]:
    from trilemma.core.errors import InputError

    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not all(names):
        raise InputError(f"--cascade '{text}' is not SMALL,LARGE: two models separated by one comma.")
    return names[0], names[1]


def _show(record: CascadeRecord) -> None:
    from trilemma.cli import console
    from trilemma.core.quantity import format_percent

    rule, share = record.rule, format_percent(record.kept_share)
    meaning = {"mean": "geometric mean of its token probabilities", "p10": "10% quantile of its token probabilities"}
    typer.echo(
        f"The small model's answer is kept when the {meaning[rule.signal]} is at least {rule.threshold:.3f}: "
        f"{share} of {record.confirm_answers} answers that the threshold was not chosen on, "
        f"{format_percent(record.kept_token_share)} of their tokens."
    )
    metrics = ["top1_agreement", "ppl_increase", "answer_s", "energy_j_per_answer"]
    rows = [
        [name, *(console.show(record.measurements[name][metric]) for metric in metrics)] for name in record.measurements
    ]
    console.table("", ["answered by", *metrics], rows)
    ratio, low, high = record.relative_answer_s
    span = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    says = (
        "no clear difference" if low is None or high is None or low <= 1 <= high else "a gain" if high < 1 else "a loss"
    )
    typer.echo(f"Time of an answer against the large model alone: x{ratio:.2f}{span}, {says}.")
    for metric in metrics[:2]:
        chance = record.measurements["cascade"][metric].conditions["at_random"]
        typer.echo(f"As many answers kept at random would have {metric} {format_percent(float(chance))}.")
    for found in record.verdicts:
        typer.echo(
            f"{found.outcome} {found.limit.text}: {found.reason}" + (f"; {found.settle}" if found.settle else "")
        )
    for note in record.notes:
        typer.echo(note)
