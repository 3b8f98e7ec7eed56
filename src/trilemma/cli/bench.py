"""`trilemma bench`: what models cost on this machine, interleaved, with the noise watched; also as sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trilemma.core.results import BenchReport
    from trilemma.runtime.engine import EngineOptions

PROMPT, OUTPUT = 128, 32
NATIVE = "native"


def bench(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints, artifacts or bare config.json files (random weights: cost only).")
    ],
    scheme: Annotated[
        list[str] | None,
        typer.Option("--scheme", help="Schemes to measure each model in, by comma or repeated: bf16,W8A8,W4A8-g32."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help=f"Prompt tokens of each sequence, several by comma; {PROMPT} by default."),
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option("--output", help=f"Output tokens of each sequence, several by comma; {OUTPUT} by default."),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option("--batch", help="Throughput against latency: numbers of sequences in each step, 1,2,4,8."),
    ] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option("--kv", help="KV caches, by comma or repeated: none (recompute), f32, bf16, int8, int4."),
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option("--context", help="Recompute or cache: depths to time one step of each KV cache at, 32,128,512."),
    ] = None,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="With --context: also time the prefill of a prompt as long as each depth.")
    ] = False,
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
    threads: Annotated[
        list[str] | None,
        typer.Option("--threads", help="Threads, several by comma; all usable cores by default."),
    ] = None,
    isa: options.IsaChoice = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option("--runtime", help=f"Engines, several by comma; see `trilemma list engines`. {NATIVE} by default."),
    ] = None,
    repetitions: Annotated[
        int | None,
        typer.Option("--repetitions", min=1, help="Timed ones; by default until times are known within 2%, in sweeps "
                     "15 (batches) or 7 (depths)."),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option("--time", help="What the repetitions may take, such as 30s; 20s for each pair of lengths."),
    ] = None,
    peak_memory: Annotated[
        bool, typer.Option("--peak-memory", help="Also run each folder in a process of its own: its high-water mark.")
    ] = False,
    seed: options.Seed = 0,
    form: Annotated[options.TableForm, typer.Option("-o", "--as", help="Form of the table on stdout.")] = "md",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw a sweep (batch, context, prompt, threads) as an SVG file.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="Also write the whole record, for `trilemma report`.")
    ] = None,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Measure time and memory of models side by side; over lengths, threads, runtimes, batches or depths as well."""
    from trilemma import api
    from trilemma.cli import console

    schemes, policies = options.split_names(scheme), options.split_names(kv)
    sizes, depths = _numbers("--batch", batch), _numbers("--context", context)
    prompts, outputs = _numbers("--prompt", prompt) or [PROMPT], _numbers("--output", output) or [OUTPUT]
    counts, runtimes = _numbers("--threads", threads), options.split_names(runtime) or [NATIVE]
    _check_views(
        sizes, depths, {"--prompt": prompts, "--output": outputs, "--runtime": runtimes},
        {"--prompt": prompt, "--output": output}, {"--memory": memory, "--device": device, "--prefill": prefill},
        {"--time": time, "--peak-memory": peak_memory},
    )  # fmt: skip
    _check_names(policies, runtimes)
    if plot is not None and not (sizes or depths or len(prompts) > 1 or len(counts) > 1):
        raise _no_sweep()
    console.check_places(plot, save)
    opened = _variants(counts, isa, [] if depths else policies)
    with console.progress("bench") as update:
        if depths:
            report = api.bench_contexts(
                models, contexts=depths, kv=policies or ("none", "bf16", "int8"), schemes=schemes, runtime=runtimes[0],
                options=opened, repetitions=repetitions or 7, point_time_s=point_time, memory_bytes=_bytes(memory),
                prefill=prefill, devices=device or (), seed=seed, progress=update,
            )  # fmt: skip
        elif sizes:
            report = api.bench_batches(
                models, batches=sizes, schemes=schemes, runtime=runtimes[0], options=opened,
                prompt_tokens=prompts[0], output_tokens=outputs[0], repetitions=repetitions or 15, seed=seed,
                progress=update,
            )  # fmt: skip
        else:
            report = api.bench(
                models, schemes=schemes, runtime=runtimes, options=opened, prompt_tokens=prompts,
                output_tokens=outputs, repetitions=repetitions, time=time, peak_memory=peak_memory, seed=seed,
                progress=update,
            )  # fmt: skip
    _write(report, "json" if json else form, plot, save)


def _write(report: BenchReport, form: str, plot: Path | None, save: Path | None) -> None:
    from trilemma.cli import bench_tables, console
    from trilemma.core.files import write_whole
    from trilemma.report.plot import write_plot
    from trilemma.report.sweep_charts import sweep_chart

    if save is not None:
        write_whole(save, report.model_dump_json(indent=1) + "\n")
    if plot is not None:
        write_plot(plot, sweep_chart(report))
    if form == "json":
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
    return list(dict.fromkeys(found))


def _check_views(
    sizes: Sequence[int],
    depths: Sequence[int],
    lists: Mapping[str, Sequence[object]],
    lengths: Mapping[str, object],
    of_depths: Mapping[str, object],
    of_table: Mapping[str, object],
) -> None:
    """Refuse options that do not go together, before anything is opened."""
    from trilemma.core.errors import InputError

    if sizes and depths:
        raise InputError("--batch and --context are two sweeps; ask for one of them.")
    if depths and any(value is not None for value in lengths.values()):
        raise InputError("--context times single steps at each depth; --prompt and --output have no meaning with it.")
    if not depths and any(of_depths.values()):
        names = ", ".join(of_depths)
        raise InputError(f"{names} belong to the sweep over depths; give --context 32,128,512 too.")
    if sizes or depths:
        sweep = "--batch" if sizes else "--context"
        for option, values in lists.items():
            if len(values) > 1:
                raise InputError(f"{sweep} is a sweep of its own; give one value of {option}, or leave {sweep} out.")
        for option, value in of_table.items():
            if value:
                raise InputError(f"{option} has no meaning with {sweep}. Leave one of them out.")


def _check_names(policies: Sequence[str], runtimes: Sequence[str]) -> None:
    from typing import get_args

    from trilemma.core.errors import UnknownNameError
    from trilemma.runtime import ENGINES

    for policy in policies:
        if policy not in get_args(options.Kv):
            raise UnknownNameError("KV cache", policy, get_args(options.Kv))
    for name in runtimes:
        if name not in ENGINES.names():
            raise UnknownNameError("engine", name, ENGINES.names())


def _no_sweep() -> Exception:
    from trilemma.core.errors import InputError
    from trilemma.report.sweep_charts import NO_SWEEP

    return InputError(NO_SWEEP)


def _variants(counts: Sequence[int], isa: options.Isa | None, policies: Sequence[str]) -> list[EngineOptions]:
    """Every number of threads with every cache."""
    from trilemma.runtime.engine import EngineOptions

    given = EngineOptions(isa=isa)
    threads = [given.model_copy(update={"threads": count}) for count in counts] or [given]
    return [one.model_copy(update={"kv_cache": policy}) for one in threads for policy in policies] or threads


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
