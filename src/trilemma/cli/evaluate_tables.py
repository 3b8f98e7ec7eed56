"""What `trilemma eval` shows: tables of texts, tasks and answers in every form, and the chart by domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from trilemma.core.measurement import Measurement
    from trilemma.measure.results import DomainRow, EvaluateResult

ALONE = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
PAIRED = ("perplexity", "bits_per_byte", "ppl_increase", "kl_mean", "kl_p99", "kl_p999", "top1_agreement")
ANSWERS = ("repetition_rate", "looping_rate", "empty_rate", "answer_tokens", "changed_answers", "agreed_tokens")
Table = tuple[list[str], list[list[str]]]


def chart(results: Sequence[EvaluateResult]) -> str:
    """KL divergence by domain and model, or perplexity where there is no reference.

    Far from what a model was trained on perplexity can fall while the answers move: KL sees that.
    """
    from trilemma.cli.console import show
    from trilemma.report.dot_chart import Dot, dot_chart
    from trilemma.report.scale import Axis

    paired = "kl_mean" in results[0].rows[0].measurements
    metric = "kl_mean" if paired else "perplexity"
    groups = [row.domain for row in results[0].rows]
    rows = [
        (_short(result.model), [Dot(found.value, found.ci95, show(found).partition(" [")[0].removesuffix(" nats"))
                                for found in (row.measurements[metric] for row in result.rows)])
        for result in results
    ]  # fmt: skip
    axis = Axis("mean KL divergence from the reference, nats a token") if paired else Axis("perplexity", log=True)
    versus = f" against {_short(results[0].reference)}" if results[0].reference else ""
    notes = [f"Context {results[0].context}{versus}; bars are 95% intervals over documents."]
    return dot_chart(groups, rows, axis, title=f"{'What changed' if paired else 'Perplexity'}, by domain", notes=notes)


def _short(path: str | None) -> str:
    return Path(path).name or str(path) if path else ""


def _texts(results: Sequence[EvaluateResult]) -> Table:
    """Headers and cells, domains together; several models are named, a reference adds its own perplexity."""
    from trilemma.cli import console
    from trilemma.core.quantity import significant

    before, several = "ppl_increase" in results[0].rows[0].measurements, len(results) > 1
    shown = [metric for metric in (PAIRED if before else ALONE) if metric in results[0].rows[0].measurements]

    def cells(result: EvaluateResult, row: DomainRow) -> list[str]:
        found = row.measurements
        about = [row.domain, *([_short(result.model)] if several else []), str(row.documents), f"{row.tokens:,}"]
        if before:
            about.append(significant(float(found["ppl_increase"].conditions["reference_perplexity"])))
        return [*about, *(console.show(found[metric]) for metric in shown)]

    headers = [
        "domain",
        *(["model"] if several else []),
        "windows" if results[0].protocol == "llama.cpp" else "documents",
        "tokens",
        *(["reference perplexity"] if before else []),
        *shown,
    ]
    count = len(results[0].rows)
    return headers, [cells(result, result.rows[index]) for index in range(count) for result in results]


def _tasks(results: Sequence[EvaluateResult]) -> Table:
    """Tasks together: accuracies, and against a reference the change and the items that moved each way."""
    from trilemma.cli import console

    several = len(results) > 1
    paired = any(row.gained is not None for result in results for row in result.tasks)
    headers = ["task", *(["model"] if several else []), "items", "accuracy", "accuracy_norm",
               *(["accuracy_change", "gained", "lost"] if paired else [])]  # fmt: skip
    rows = []
    for index in range(len(results[0].tasks)):
        for result in results:
            row = result.tasks[index]
            shares = [row.measurements.get(f"{family}/{row.task}") for family in ("accuracy", "accuracy_norm")]
            cells = [row.task, *([_short(result.model)] if several else []), str(row.items), *map(console.show, shares)]
            if paired:
                change = row.measurements.get(f"accuracy_change/{row.task}")
                cells += [console.show(change), str(row.gained), str(row.lost)]
            rows.append(cells)
    return headers, rows


def _answers(results: Sequence[EvaluateResult]) -> Table:
    """The generation check, a line a model."""
    from trilemma.cli import console

    found = [(result.model, result.generation) for result in results if result.generation is not None]
    shown = [metric for metric in ANSWERS if metric in found[0][1].measurements]
    rows = [
        [_short(model), str(row.prompts), *(console.show(row.measurements[metric]) for metric in shown),
         "yes" if row.collapsed else "no"]
        for model, row in found
    ]  # fmt: skip
    return ["model", "prompts", *shown, "collapsed"], rows


def _parts(results: Sequence[EvaluateResult]) -> list[tuple[str, Table]]:
    """(title, table) of everything that was measured."""
    first = results[0]
    parts = []
    if first.rows:
        parts.append((_how(first), _texts(results)))
    if first.tasks:
        parts.append(("tasks; intervals over items", _tasks(results)))
    if first.generation is not None:
        title = f"greedy answers of at most {first.generation.max_tokens} tokens; intervals over prompts"
        parts.append((title, _answers(results)))
    return parts


def _how(result: EvaluateResult) -> str:
    stride = f", stride {result.stride}" if result.stride else ""
    protocol = ", llama.cpp's protocol" if result.protocol == "llama.cpp" else ""
    return f"context {result.context}{stride}{protocol}"


def show(results: Sequence[EvaluateResult]) -> None:
    """Tables for a terminal."""
    from trilemma.cli import console

    names = ", ".join(result.model for result in results)
    versus = f" against {results[0].reference}" if results[0].reference else ""
    for title, (headers, rows) in _parts(results):
        console.table(f"{names}{versus}, {title}", headers, rows)
    for note in notes_of(results):
        typer.echo(note)


def markdown(results: Sequence[EvaluateResult]) -> str:
    several = len(results) > 1
    lines = []
    for title, (headers, rows) in _parts(results):
        texts = 2 if several and headers[1] == "model" else 1
        lines += [f"| {' | '.join(headers)} |", "|" + "---|" * texts + "---:|" * (len(headers) - texts)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        over = "" if "intervals over" in title else f"; 95% intervals over {_unit(results[0])}"
        lines += ["", f"{title[0].upper()}{title[1:]}{over}.", ""]
    return "\n".join([*lines[:-1], *notes_of(results)]) + "\n"


def _unit(result: EvaluateResult) -> str:
    return "windows" if result.protocol == "llama.cpp" else "documents"


def notes_of(results: Sequence[EvaluateResult]) -> list[str]:
    return list(dict.fromkeys(note for result in results for note in result.notes))


def csv_text(results: Sequence[EvaluateResult]) -> str:
    """One line a figure; tasks and answers stand with their items and prompts as documents."""
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "reference", "domain", "documents", "tokens", "metric", "value", "unit", "low", "high"])
    for result in results:
        groups: list[tuple[str, int, int | str, dict[str, Measurement]]] = [
            (row.domain, row.documents, row.tokens, row.measurements) for row in result.rows
        ]
        groups += [(row.task, row.items, "", row.measurements) for row in result.tasks]
        if result.generation is not None:
            groups.append(("answers", result.generation.prompts, "", result.generation.measurements))
        for name, count, tokens, measurements in groups:
            about = [result.model, result.reference or "", name, count, tokens]
            for metric, found in measurements.items():
                writer.writerow([*about, metric, found.value, found.unit, *(found.interval or ("", ""))])
    return out.getvalue()


def json_lines(results: Sequence[EvaluateResult]) -> str:
    return "".join(result.model_dump_json() + "\n" for result in results)
