"""`trilemma bench`: what models cost on this machine, interleaved, with the noise watched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from trilemma.core.results import BenchReport, BenchRow

METRICS = (
    "weights_bytes", "engine_memory_bytes", "ttft_s", "tpot_s", "prefill_tokens_per_s", "decode_tokens_per_s",
)  # fmt: skip


def bench(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints, artifacts or bare config.json files (random weights: cost only).")
    ],
    scheme: Annotated[
        list[str] | None,
        typer.Option("--scheme", help="Schemes to measure each model in, by comma or repeated: bf16,W8A8,W4A8-g32."),
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Prompt tokens.")] = 128,
    output: Annotated[int, typer.Option("--output", min=2, help="Output tokens.")] = 32,
    kv: options.KvCache = None,
    threads: options.Threads = None,
    isa: options.IsaChoice = None,
    runtime: options.Runtime = "native",
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Timed ones, after a discarded round.")] = 5,
    seed: options.Seed = 0,
    form: Annotated[options.TableForm, typer.Option("-o", "--as", help="Form of the table on stdout.")] = "md",
    save: Annotated[
        Path | None, typer.Option("--save", help="Also write the whole record, for `trilemma report`.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure time and memory of models side by side, in several schemes if asked."""
    from trilemma.api import bench as measure
    from trilemma.cli import console
    from trilemma.runtime.engine import EngineOptions

    schemes = [name for given in scheme or [] for name in given.split(",") if name]
    with console.progress("bench") as update:
        report = measure(
            models, schemes=schemes, runtime=runtime, options=EngineOptions(threads=threads, kv_cache=kv, isa=isa),
            prompt_tokens=prompt, output_tokens=output, repetitions=repetitions, seed=seed, progress=update,
        )  # fmt: skip
    if save is not None:
        save.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if json or form == "json":
        console.print_json(report)
    else:
        typer.echo({"md": _markdown, "csv": _csv, "jsonl": _json_lines}[form](report), nl=False)


def _markdown(report: BenchReport) -> str:
    from trilemma.cli.console import show

    headers = ["model", "form", *METRICS, "of bandwidth"]
    lines = [f"| {' | '.join(headers)} |", "|---|---|" + "---:|" * (len(headers) - 2)]
    for row in report.rows:
        shown = (show(row.trial.measurements.get(metric)).replace(" tokens/s", "") for metric in METRICS)
        lines.append(f"| {_name(row)} | {row.trial.name} | " + " | ".join(shown) + f" | {_share(row)} |")
    here = report.environment
    lines += ["", f"{here.cpu}, {here.isa}, {here.threads} threads; 95% intervals; ! marks a noisy run."]
    if any(row.random_weights for row in report.rows):
        lines.append("* random weights: cost only, nothing is said about quality.")
    lines += report.notes
    return "\n".join(lines) + "\n"


def _name(row: BenchRow) -> str:
    return f"{row.model} ({row.parameters / 1e6:.1f}M{', *' if row.random_weights else ''})"


def _share(row: BenchRow) -> str:
    measured = row.trial.measurements.get("decode_tokens_per_s")
    share = None if measured is None else measured.conditions.get("roofline_share")
    return f"{share:.0%}" if isinstance(share, float) else "—"


def _csv(report: BenchReport) -> str:
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    headers = ["model", "form", "parameters", "random_weights", "metric", "value", "unit", "low", "high", "noisy"]
    writer.writerow(headers)
    for row in report.rows:
        about = [row.model, row.trial.name, row.parameters, row.random_weights]
        for name, found in row.trial.measurements.items():
            writer.writerow([*about, name, found.value, found.unit, *(found.interval or ("", "")), found.noisy])
    return out.getvalue()


def _json_lines(report: BenchReport) -> str:
    return "".join(row.model_dump_json() + "\n" for row in report.rows)
