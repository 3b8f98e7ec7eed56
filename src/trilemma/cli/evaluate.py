"""`trilemma eval`: quality of models on texts, tasks and answers, alone or against their reference, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

Protocol = Literal["windows", "llama.cpp"]


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
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", min=1, help="Tokens from one window's start to the next; only the last so many are scored."
        ),
    ] = None,
    protocol: Annotated[
        Protocol,
        typer.Option("--protocol", help="How texts are cut and scored; llama.cpp: as its perplexity tool does."),
    ] = "windows",
    reference: Annotated[
        str | None,
        typer.Option("--reference", "--against", help="Unmodified model to compare with; adds KL and agreement."),
    ] = None,
    max_tokens: options.TextTokens = 30_000,
    prepare: options.PrepareText = "none",
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="A log-likelihood task and its items, name=file (.jsonl). May be repeated."),
    ] = None,
    limit_items: Annotated[
        int | None, typer.Option("--limit-items", min=1, help="Items of each task, the first so many; all by default.")
    ] = None,
    generate: Annotated[
        int,
        typer.Option("--generate", min=0, help="Prompts from the texts that are continued greedily."),
    ] = 0,
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", min=1, help="With --generate: tokens of an answer at most.")
    ] = 64,
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
    """Perplexity by domain, accuracy of tasks, greedy answers; against a reference also KL and what changed."""
    from trilemma.cli import console
    from trilemma.cli.evaluate_tables import chart, csv_text, json_lines, markdown, show
    from trilemma.core.errors import InputError
    from trilemma.core.files import write_whole
    from trilemma.measure.quality.evaluate import evaluate_all
    from trilemma.report.plot import write_plot
    from trilemma.runtime.engine import EngineOptions

    unnamed = next((item for item in domain or () if "=" not in item.lstrip("=")), None)
    if unnamed is not None:
        raise InputError(f"--domain takes name=file, such as law=contracts.txt; not '{unnamed}'.")
    texts = [*(data or ()), *(domain or ())]
    options.refuse_unused({"--task": bool(task)}, {("--task",): {"--limit-items": limit_items}})
    if plot is not None and not texts:
        raise InputError("--plot draws the figures by domain; give texts with --data as well, or leave it out.")
    console.check_places(plot, save)
    with console.progress("eval") as update:
        results = evaluate_all(
            models, by_domain(texts), reference=reference, context=context, stride=stride, protocol=protocol,
            max_tokens=max_tokens, prepare=prepare, tasks=tasks_of(task or ()), limit_items=limit_items,
            generate=generate, answer_tokens=answer_tokens, runtime=runtime,
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
        show(results)
    else:
        typer.echo({"md": markdown, "csv": csv_text, "jsonl": json_lines}[form](results), nl=False)


def tasks_of(given: Sequence[str]) -> dict[str, str]:
    """`--task name=file` as name -> file."""
    from trilemma.core.errors import InputError

    found: dict[str, str] = {}
    for item in given:
        name, _, path = item.partition("=")
        if not name or not path:
            raise InputError(f"--task takes name=file, such as piqa=piqa.jsonl; not '{item}'.")
        if name in found:
            raise InputError(f"The task '{name}' is given twice. Give each file a name of its own.")
        found[name] = path
    return found


def by_domain(data: Sequence[str]) -> dict[str, list[Path]] | list[Path]:
    """`--data file` or `--data name=file`; the name of a file's domain is its own unless one is given."""
    if not any("=" in item for item in data):
        return [Path(item) for item in data]
    domains: dict[str, list[Path]] = {}
    for item in data:
        name, _, path = item.rpartition("=")
        domains.setdefault(name or Path(path).name.split(".")[0], []).append(Path(path))
    return domains
