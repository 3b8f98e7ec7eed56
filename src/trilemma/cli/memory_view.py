"""What `trilemma inspect` says of memory: engine and process at the stated lengths, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from trilemma.measure.memory.forecast import MemoryForecast
    from trilemma.model.model import Model


def forecasts(
    model: Model, schemes: list[str], *, prompt: int, output: int, kv: options.Kv | None, threads: int | None
) -> dict[str, MemoryForecast]:
    """One for each scheme; without schemes, of the model as it is."""
    from trilemma.search.forecast import AS_IT_IS
    from trilemma.search.memory_outlook import forecast_schemes_memory

    return forecast_schemes_memory(
        model, schemes=schemes or (AS_IT_IS,), prompt_tokens=prompt, output_tokens=output, kv=kv, threads=threads
    )


def memory_json(model: Model, found: dict[str, MemoryForecast]) -> dict[str, Any]:
    """Scheme -> its parts, and the same figures as measurements marked 'estimated'."""
    return {
        scheme: {
            "forecast": forecast.model_dump(mode="json"),
            "measurements": {
                metric: item.model_dump(mode="json") for metric, item in forecast.measurements(model.config).items()
            },
        }
        for scheme, forecast in found.items()
    }


def show_engine_line(model: Model, tokens: int) -> None:
    """'engine memory ~15.6 MB for 160 tokens', where the engine can run the model."""
    from trilemma.core.errors import TrilemmaError
    from trilemma.core.quantity import format_quantity
    from trilemma.runtime.memory_forecast import forecast_engine

    tokens = min(tokens, model.config.max_context)
    try:
        held = forecast_engine(model, context=tokens)
    except TrilemmaError as error:
        typer.echo(f"engine memory unavailable: {error}")
        return
    typer.echo(
        f"engine memory ~{format_quantity(held.total_bytes, 'bytes')} for {tokens} tokens, KV cache {held.kv_cache} "
        "(--prompt, --output, --kv and --scheme say for what, and add the process)"
    )


def show_memory(found: dict[str, MemoryForecast]) -> None:
    """The table, and what the numbers rest on."""
    from trilemma.cli import console
    from trilemma.core.quantity import format_quantity
    from trilemma.measure.memory.forecast import PEAK_ERROR, PEAK_ERROR_BYTES

    def cells(forecast: MemoryForecast) -> list[str]:
        engine, process = forecast.engine, forecast.process
        sizes = (engine.weights_bytes, engine.kv_bytes, engine.scratch_bytes, engine.total_bytes, process.peak_bytes)
        about = "~" if forecast.exact else "about "
        return [engine.kv_cache, *(f"{about}{format_quantity(size, 'bytes')}" for size in sizes)]

    first = next(iter(found.values()))
    title = (
        f"Memory for {first.prompt_tokens:,} prompt and {first.output_tokens:,} output tokens, "
        f"{first.threads} thread{'s' * (first.threads != 1)} (estimated; nothing was loaded)"
    )
    rows = [[scheme, *cells(forecast)] for scheme, forecast in found.items()]
    console.table(title, ["scheme", "KV", "weights", "KV cache", "scratch", "engine", "process peak"], rows)
    empty = format_quantity(first.process.empty_process_bytes, "bytes")
    typer.echo(
        f"Engine: the sizes that the native engine reserves, computed. Process: {empty} of a process that opened "
        f"nothing (measured now), then weights, cache and scratch at the worst moment; good to {PEAK_ERROR:.0%} + "
        f"{PEAK_ERROR_BYTES / 1e6:.0f} MB."
    )
