"""`trilemma bench`: what models cost on this machine, interleaved, with the noise watched; also as sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trilemma.runtime.engine import EngineOptions

PROMPT, OUTPUT = 128, 32


def bench(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints, artifacts or bare config.json files (random weights: cost only).")
    ],
    scheme: Annotated[
        list[str] | None,
        typer.Option("--scheme", help="Schemes to measure each model in, by comma or repeated: bf16,W8A8,W4A8-g32."),
    ] = None,
    prompt: Annotated[
        int | None, typer.Option("--prompt", min=1, help=f"Prompt tokens of each sequence; {PROMPT} by default.")
    ] = None,
    output: Annotated[
        int | None, typer.Option("--output", min=2, help=f"Output tokens of each sequence; {OUTPUT} by default.")
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option("--batch", help="Throughput against latency: numbers of sequences in each step, 1,2,4,8."),
    ] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option("--kv", help="KV caches to measure, by comma or repeated: none (recompute), f32, bf16, int8."),
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option("--context", help="Recompute or cache: depths to time one step of each KV cache at, 32,128,512."),
    ] = None,
    point_time: Annotated[
        float, typer.Option("--point-time", min=0.01, help="Seconds a depth may take; a longer step is skipped.")
    ] = 20.0,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="With --context: positions that each KV cache holds within, say, 64MB."),
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", help="With --context: estimate the same for a device profile.")
    ] = None,
    threads: options.Threads = None,
    isa: options.IsaChoice = None,
    runtime: options.Runtime = "native",
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Timed ones, after a discarded round.")] = 5,
    seed: options.Seed = 0,
    form: Annotated[options.TableForm, typer.Option("-o", "--as", help="Form of the table on stdout.")] = "md",
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw a sweep, as a stand-alone SVG file.")] = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="Also write the whole record, for `trilemma report`.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure time and memory of models side by side; over batch sizes or cache depths as well."""
    from trilemma import api
    from trilemma.cli import bench_tables, console
    from trilemma.core.errors import InputError
    from trilemma.core.files import write_whole
    from trilemma.report.plot import write_plot
    from trilemma.report.sweep_charts import sweep_chart
    from trilemma.runtime.engine import EngineOptions

    schemes, policies = options.split_names(scheme), options.split_names(kv)
    sizes, depths = _numbers("--batch", batch), _numbers("--context", context)
    _check(policies, sizes, depths, prompt, output, memory, device)
    if plot is not None and not (sizes or depths):
        raise InputError("A plot needs a sweep: ask for one with --batch 1,2,4,8 or with --context 32,64,128.")
    console.check_places(plot, save)
    opened = EngineOptions(threads=threads, isa=isa)
    lengths = {"prompt_tokens": prompt or PROMPT, "output_tokens": output or OUTPUT}
    with console.progress("bench") as update:
        if depths:
            report = api.bench_contexts(
                models, contexts=depths, kv=policies or ("none", "bf16", "int8"), schemes=schemes, runtime=runtime,
                options=opened, repetitions=repetitions, point_time_s=point_time, memory_bytes=_bytes(memory),
                devices=device or (), seed=seed, progress=update,
            )  # fmt: skip
        elif sizes:
            report = api.bench_batches(
                models, batches=sizes, schemes=schemes, runtime=runtime, options=_variants(opened, policies),
                repetitions=repetitions, seed=seed, progress=update, **lengths,
            )  # fmt: skip
        else:
            report = api.bench(
                models, schemes=schemes, runtime=runtime, options=_variants(opened, policies),
                repetitions=repetitions, seed=seed, progress=update, **lengths,
            )  # fmt: skip
    if save is not None:
        write_whole(save, report.model_dump_json(indent=1) + "\n")
    if plot is not None:
        write_plot(plot, sweep_chart(report))
    if json or form == "json":
        console.print_json(report)
    else:
        write = {"md": bench_tables.markdown, "csv": bench_tables.csv_text, "jsonl": bench_tables.json_lines}[form]
        typer.echo(write(report), nl=False)


def _numbers(option: str, given: Sequence[str] | None) -> list[int]:
    from trilemma.core.errors import InputError

    found = []
    for word in options.split_names(given):
        if not word.isdecimal() or int(word) < 1:
            raise InputError(f"{option} takes whole numbers from 1 on, by comma, such as 1,2,4; not '{word}'.")
        found.append(int(word))
    if given and not found:
        raise InputError(f"{option} was given without a number; give some by comma, such as 1,2,4.")
    return found


def _check(
    policies: Sequence[str],
    sizes: Sequence[int],
    depths: Sequence[int],
    prompt: int | None,
    output: int | None,
    memory: str | None,
    device: Sequence[str] | None,
) -> None:
    """Refuse options that do not go together, before anything is opened."""
    from typing import get_args

    from trilemma.core.errors import InputError, UnknownNameError

    for policy in policies:
        if policy not in get_args(options.Kv):
            raise UnknownNameError("KV cache", policy, get_args(options.Kv))
    if sizes and depths:
        raise InputError("--batch and --context are two sweeps; ask for one of them.")
    if depths and (prompt is not None or output is not None):
        raise InputError("--context times single steps at each depth; --prompt and --output have no meaning with it.")
    if not depths and (memory is not None or device):
        raise InputError("--memory and --device belong to the sweep over depths; give --context 32,128,512 too.")


def _variants(opened: EngineOptions, policies: Sequence[str]) -> list[EngineOptions]:
    return [opened.model_copy(update={"kv_cache": policy}) for policy in policies] or [opened]


def _bytes(text: str | None) -> float | None:
    """'64MB' in bytes."""
    if text is None:
        return None
    from trilemma.core.errors import InputError
    from trilemma.core.limit import Limit

    limit = Limit.parse(f"memory<={text}")
    if limit.relative or limit.value <= 0:
        raise InputError(f"--memory takes an amount such as 64MB, not '{text}'.")
    return limit.value
