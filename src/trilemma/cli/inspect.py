"""`trilemma inspect`: what a model is and would cost, by arithmetic on its headers; no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from trilemma.model.cost import Inspection
    from trilemma.model.model import Model

PROMPT, OUTPUT = 128, 32
WOULD_BE = ("f32", "bf16", "int8-channel", "int8-g32", "int4-g128", "int4-g64", "int4-g32", "int4-g32-asym")


def inspect(
    model: options.Model,
    device: options.OtherDevice = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme",
            help="Schemes to compare in memory (and with --device in time), 'as it is' among them; comma-separated.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=2, help="With --device: prompt and answer together; 512 or the model's own."),
    ] = None,
    duty_cycle: options.Duty = None,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose", help="Measure what binds it (memory, compute, overhead) and what would help; GGUF too."
        ),
    ] = False,
    complaint: Annotated[
        Literal["slow", "large", "hungry"] | None,
        typer.Option("--complaint", help="With --diagnose: orders the remedies by time, by memory or by energy."),
    ] = None,
    waterfall: Annotated[
        str | None,
        typer.Option("--waterfall", help="Recipe file, artifact or scheme: what each of its steps gains, in order."),
    ] = None,
    data: options.Data = None,
    prepare: options.PrepareText = "none",
    plot: Annotated[Path | None, typer.Option("--plot", help="With --waterfall: SVG file to write.")] = None,
    prompt: Annotated[
        int | None,
        typer.Option(
            "--prompt", min=8, help=f"Prompt tokens that memory (or time) is stated for; {PROMPT} by default."
        ),
    ] = None,
    output: Annotated[
        int | None,
        typer.Option(
            "--output", min=4, help=f"Output tokens that memory (or time) is stated for; {OUTPUT} by default."
        ),
    ] = None,
    threads: options.Threads = None,
    kv: options.KvCache = None,
    json: options.Json = False,
) -> None:
    """Parameters, bytes by format, memory, KV cache and work per token, from the headers alone."""
    lengths = {"--prompt": prompt, "--output": output, "--threads": threads, "--kv": kv}
    memory = scheme is not None or any(value is not None for value in lengths.values())
    views = {"--device": device is not None, "--diagnose": diagnose, "--waterfall": waterfall is not None}
    belongs: dict[tuple[str, ...], dict[str, object]] = {
        ("--device",): {"--context": context, "--duty-cycle": duty_cycle},
        ("--diagnose",): {"--complaint": complaint},
        ("--waterfall",): {"--data": data, "--plot": plot, "--prepare": prepare != "none"},
    }
    if any(views.values()):  # without a view, these say what memory is stated for
        belongs[("--device",)]["--scheme"] = scheme
        belongs[("--diagnose", "--waterfall")] = dict(lengths)
    options.refuse_unused(views, belongs)
    if diagnose or waterfall is not None:
        from trilemma.cli import diagnose as measured

        prompt, output = prompt or PROMPT, output or OUTPUT
        if waterfall is not None:
            measured.waterfall(
                model, waterfall, data=data, prepare=prepare, plot=plot, prompt=prompt, output=output, threads=threads,
                kv=kv, json=json,
            )  # fmt: skip
        else:
            measured.diagnose(
                model, complaint=complaint, prompt=prompt, output=output, threads=threads, kv=kv, json=json
            )
        return
    from trilemma.cli import console, device_view, memory_view
    from trilemma.formats.artifact import load_any
    from trilemma.model.cost import inspect_model

    schemes = options.split_names(scheme)
    opened = load_any(model)
    found = inspect_model(opened)
    would_weigh = {name: _weight_in(opened, name) for name in WOULD_BE}
    held = {}
    if memory and device is None:
        prompt, output = prompt or PROMPT, output or OUTPUT
        held = memory_view.forecasts(opened, schemes, prompt=prompt, output=output, kv=kv, threads=threads)
    if json:
        there = {} if device is None else device_view.device_json(opened, device, schemes, context, duty_cycle)
        document = {**found.model_dump(mode="json"), "weights_bytes_in": would_weigh}
        document |= {"on_device": there} if there else {}
        console.print_json(document | ({"memory": memory_view.memory_json(opened, held)} if held else {}))
        return
    if device is not None:
        device_view.show_device(model, opened, device, schemes, context, duty_cycle)
        return
    _show_facts(model, found)
    if held:
        memory_view.show_memory(held)
    else:
        _show_tables(found, would_weigh)
        memory_view.show_engine_line(opened, PROMPT + OUTPUT)


def _weight_in(model: Model, name: str) -> int:
    """Weights in one format; a 4-bit one keeps the embedding and head in int8-g32, as the schemes do."""
    from trilemma.formats import FORMATS
    from trilemma.formats.pack import format_bytes
    from trilemma.model.cost import weights_bytes

    outer = "int8-g32" if FORMATS.get(name).bits < 8 else name

    def format_of(tensor: str) -> str:
        return name if tensor.startswith("layers.") else outer

    return weights_bytes(model.config, format_of, format_bytes)


def _show_facts(name: str, found: Inspection) -> None:
    from trilemma.core.quantity import format_quantity

    weights = "random weights: cost only, no quality" if found.random else f"stored as {found.dtype}"
    typer.echo(f"{name}: {found.architecture}")
    typer.echo(f"parameters   {found.parameters:,} ({weights}), {format_quantity(found.weights_bytes, 'bytes')}")
    if found.active_parameters != found.parameters:
        typer.echo(f"active       {found.active_parameters:,} for a token, its experts alone")
    parts = (f"{role} {count / found.parameters:.0%}" for role, count in found.parameters_by_role.items() if count)
    typer.echo(f"of which     {', '.join(parts)}")
    if found.unknown_tensors:
        typer.echo(f"left out     tensors that this family does not know: {', '.join(found.unknown_tensors[:5])}")
    typer.echo("")


def _show_tables(found: Inspection, would_weigh: dict[str, int]) -> None:
    from trilemma.cli import console
    from trilemma.core.quantity import format_quantity

    rows = [
        [name, format_quantity(size, "bytes"), f"{size / found.weights_bytes:.0%}"]
        for name, size in would_weigh.items()
    ]
    console.table(
        "Weights in other formats (4-bit ones keep embedding and head in int8-g32)", ["format", "bytes", "of now"], rows
    )
    typer.echo("")
    rows = [
        [f"{context:,}", *(format_quantity(found.kv_bytes[kv][context], "bytes") for kv in found.kv_bytes),
         f"{found.macs_per_token[context] / 1e6:,.1f} M", f"{found.decode_macs_per_byte[context]:.2f}"]
        for context in found.macs_per_token
    ]  # fmt: skip
    headers = ["context", *(f"KV {kv}" for kv in found.kv_bytes), "MACs a token", "MACs a byte"]
    console.table("By context length", headers, rows)
