"""`trilemma eval`: quality of models by domain, alone or against their reference, with intervals over documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trilemma.measure.results import DomainRow, EvaluateResult

METRICS = ("perplexity", "bits_per_byte", "ppl_increase", "kl_mean", "kl_p99", "kl_p999", "top1_agreement")


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Checkpoints or artifacts; several share one table and one run of the reference."),
    ],
    data: options.SomeNamedData = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain", help="A domain and its text, name=file. May be repeated; one name may have more files."
        ),
    ] = None,
    context: options.Context = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", "--against", help="Unmodified model to compare with; adds KL and agreement."),
    ] = None,
    max_tokens: options.TextTokens = 30_000,
    prepare: options.PrepareText = "none",
    kv: options.KvCache = None,
    threads: options.Threads = None,
    isa: options.IsaChoice = None,
    runtime: options.Runtime = "native",
    form: Annotated[
        options.TableForm | None, typer.Option("-o", "--as", help="Form on stdout instead of the table for a terminal.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw the figures by domain, as a stand-alone SVG file.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Also write the whole record as JSON.")] = None,
    json: options.Json = False,
) -> None:
    """Perplexity and bits per byte by domain; against a reference also KL, agreement and the paired increase."""
    from trilemma.cli import console
    from trilemma.core.errors import InputError
    from trilemma.core.files import write_whole
    from trilemma.measure.quality.evaluate import evaluate_all
    from trilemma.report.plot import write_plot
    from trilemma.runtime.engine import EngineOptions

    unnamed = next((item for item in domain or () if "=" not in item.lstrip("=")), None)
    if unnamed is not None:
        raise InputError(f"--domain takes name=file, such as law=contracts.txt; not '{unnamed}'.")
    console.check_places(plot, save)
    with console.progress("eval") as update:
        results = evaluate_all(
            models, by_domain([*(data or ()), *(domain or ())]), reference=reference, context=context,
            max_tokens=max_tokens, prepare=prepare, runtime=runtime,
            options=EngineOptions(threads=threads, kv_cache=kv, isa=isa), progress=update,
        )  # fmt: skip
    # One model is one record, as ever; several are a list.
    document = results[0] if len(results) == 1 else results
    if save is not None:
        write_whole(save, console.json_text(document))
    if plot is not None:
        write_plot(plot, chart(results))
    if json or form == "json":
        console.print_json(document)
    elif form is None:
        _show(results)
    else:
        typer.echo({"md": _markdown, "csv": _csv, "jsonl": _json_lines}[form](results), nl=False)


def by_domain(data: Sequence[str]) -> dict[str, list[Path]] | list[Path]:
    """`--data file` or `--data name=file`; the name of a file's domain is its own unless one is given."""
    if not any("=" in item for item in data):
        return [Path(item) for item in data]
    domains: dict[str, list[Path]] = {}
    for item in data:
        name, _, path = item.rpartition("=")
        domains.setdefault(name or Path(path).name.split(".")[0], []).append(Path(path))
    return domains


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


def _columns(results: Sequence[EvaluateResult]) -> list[str]:
    return [metric for metric in METRICS if metric in results[0].rows[0].measurements]


def _rows(results: Sequence[EvaluateResult]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells, domains together; several models are named, a reference adds its own perplexity."""
    from trilemma.cli import console
    from trilemma.core.quantity import significant

    shown, several = _columns(results), len(results) > 1
    before = "ppl_increase" in shown

    def cells(result: EvaluateResult, row: DomainRow) -> list[str]:
        found = row.measurements
        about = [row.domain, *([_short(result.model)] if several else []), str(row.documents), f"{row.tokens:,}"]
        if before:
            about.append(significant(float(found["ppl_increase"].conditions["reference_perplexity"])))
        return [*about, *(console.show(found[metric]) for metric in shown)]

    headers = [
        "domain",
        *(["model"] if several else []),
        "documents",
        "tokens",
        *(["reference perplexity"] if before else []),
        *shown,
    ]
    count = len(results[0].rows)
    return headers, [cells(result, result.rows[index]) for index in range(count) for result in results]


def _show(results: Sequence[EvaluateResult]) -> None:
    from trilemma.cli import console

    headers, rows = _rows(results)
    names = ", ".join(result.model for result in results)
    versus = f" against {results[0].reference}" if results[0].reference else ""
    console.table(f"{names}{versus}, context {results[0].context}", headers, rows)
    for note in results[0].notes:
        typer.echo(note)


def _markdown(results: Sequence[EvaluateResult]) -> str:
    headers, rows = _rows(results)
    texts = 2 if len(results) > 1 else 1
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * texts + "---:|" * (len(headers) - texts)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"Context {results[0].context}; 95% intervals over documents.",
                      *results[0].notes]) + "\n"  # fmt: skip


def _csv(results: Sequence[EvaluateResult]) -> str:
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "reference", "domain", "documents", "tokens", "metric", "value", "unit", "low", "high"])
    for result in results:
        for row in result.rows:
            about = [result.model, result.reference or "", row.domain, row.documents, row.tokens]
            for name, found in row.measurements.items():
                writer.writerow([*about, name, found.value, found.unit, *(found.interval or ("", ""))])
    return out.getvalue()


def _json_lines(results: Sequence[EvaluateResult]) -> str:
    return "".join(result.model_dump_json() + "\n" for result in results)
