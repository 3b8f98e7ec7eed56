"""Pictures of the bench sweeps, from their records alone.

Cache policies over depth, throughput against latency, the first token over the prompt, rates over threads.
"""

from __future__ import annotations

from collections.abc import Callable
from textwrap import wrap

from trilemma.core.errors import InputError
from trilemma.core.measurement import Measurement
from trilemma.core.results import BenchReport, BenchRow
from trilemma.report.plot import Axis, Chart, Point, Series, chart_row

NOTE_CHARACTERS = 170
NO_SWEEP = (
    "A plot needs a sweep: ask for one with --batch 1,2,4,8, with --context 32,64,128, with --prompt 64,256,512 or "
    "with --threads 1,2,4."
)

Points = Callable[[BenchRow], Point | None]


def sweep_chart(report: BenchReport) -> str:
    """The picture of a sweep as a stand-alone SVG document.

    Raises:
        InputError: the report is of no sweep.
    """
    sweep = next((sweep_of(row) for row in report.rows), "")
    chart = {"kv": kv_chart, "batch": batch_chart, "prompt": prompt_chart, "threads": threads_chart}.get(sweep)
    if chart is None:
        raise InputError(NO_SWEEP)
    return chart(report)


def sweep_of(row: BenchRow) -> str:
    """'kv', 'batch', 'prompt', 'threads', or '' where a row stands alone."""
    found = row.trial.measurements.get("engine_memory_bytes")
    return str(found.conditions.get("sweep", "")) if found is not None else ""


def place_of(row: BenchRow) -> dict[str, str | int | float]:
    """Where in its sweep a row lies: context, kv_cache, batch, form."""
    return row.trial.measurements["engine_memory_bytes"].conditions


def kv_chart(report: BenchReport) -> str:
    """Time of a decode step, and memory beside the weights, over the depth; a line a policy."""
    depths = sorted({float(place_of(row)["context"]) for row in report.rows})

    def time(row: BenchRow) -> Point | None:
        return _timed(float(place_of(row)["context"]), row.trial.measurements["tpot_s"])

    def memory(row: BenchRow) -> Point | None:
        place = place_of(row)
        return Point(float(place["context"]), float(place["kv_bytes"]) + float(place["scratch_bytes"]))

    def name(row: BenchRow) -> str:
        policy = str(place_of(row)["kv_cache"])
        return "recompute" if policy == "none" else f"cache, {policy}"

    x = Axis("tokens so far", log=True, ticks=depths)
    charts = [
        Chart(_lines(report, name, time), x, Axis("time per token", "s", log=True), "Time"),
        Chart(_lines(report, name, memory), x, Axis("cache and scratch", "bytes", log=True),
              "Memory beside the weights", notes=_notes(report)),
    ]  # fmt: skip
    return chart_row(charts, title="Recompute the history, or cache keys and values?")


def batch_chart(report: BenchReport) -> str:
    """Gap between tokens against throughput, and the wait for the first token, by number of sequences."""
    sizes = sorted({float(place_of(row)["batch"]) for row in report.rows})

    def speed(row: BenchRow) -> Point | None:
        rate, gap = row.trial.measurements["throughput_tokens_per_s"], row.trial.measurements["itl_s"]
        if rate.value is None or gap.value is None:
            return None
        return Point(rate.value, gap.value, gap.ci95, rate.ci95, str(place_of(row)["batch"]))

    def first(row: BenchRow) -> Point | None:
        return _timed(float(place_of(row)["batch"]), row.trial.measurements["ttft_s"])

    def name(row: BenchRow) -> str:
        return str(place_of(row)["form"])

    charts = [
        Chart(_lines(report, name, speed), Axis("throughput of all sequences, tokens/s"),
              Axis("gap between tokens", "s", log=True), "Throughput against latency, by number of sequences"),
        Chart(_lines(report, name, first), Axis("sequences that come at once", log=True, ticks=sizes),
              Axis("time to first token", "s", log=True), "The wait for the first token", notes=_notes(report)),
    ]  # fmt: skip
    return chart_row(charts, title="Several sequences in each step")


def prompt_chart(report: BenchReport) -> str:
    """The wait for the first token, and the rate of the prefill, over the length of the prompt."""
    lengths = sorted({float(place_of(row)["prompt_tokens"]) for row in report.rows})
    x = Axis("prompt tokens", log=True, ticks=lengths)
    charts = [
        Chart(_over(report, "prompt_tokens", "ttft_s"), x, Axis("time to first token", "s", log=True),
              "The wait for the first token"),
        Chart(_over(report, "prompt_tokens", "prefill_tokens_per_s"), x, Axis("prefill, tokens/s", log=True),
              "Rate of the prefill", notes=_notes(report)),
    ]  # fmt: skip
    return chart_row(charts, title="Prompts of several lengths")


def threads_chart(report: BenchReport) -> str:
    """Rates of decode and prefill over the number of threads."""
    counts = sorted({float(place_of(row)["threads"]) for row in report.rows})
    x = Axis("threads", log=True, ticks=counts)
    charts = [
        Chart(_over(report, "threads", "decode_tokens_per_s"), x, Axis("decode, tokens/s", log=True), "Decode"),
        Chart(_over(report, "threads", "prefill_tokens_per_s"), x, Axis("prefill, tokens/s", log=True), "Prefill",
              notes=_notes(report)),
    ]  # fmt: skip
    return chart_row(charts, title="Several threads")


def _over(report: BenchReport, place: str, metric: str) -> list[Series]:
    """One line for each model and form, the swept place aside."""

    def point(row: BenchRow) -> Point | None:
        found = row.trial.measurements.get(metric)
        return None if found is None else _timed(float(place_of(row)[place]), found)

    several = len({row.model for row in report.rows}) > 1
    lines: dict[str, list[Point]] = {}
    for row in report.rows:
        spot = point(row)
        if spot is not None:
            line = str(place_of(row)["line"])
            lines.setdefault(f"{row.model} {line}" if several else line, []).append(spot)
    return [Series(words, points) for words, points in lines.items()]


def _timed(x: float, found: Measurement) -> Point | None:
    return None if found.value is None else Point(x, found.value, found.ci95)


def _lines(report: BenchReport, name: Callable[[BenchRow], str], point: Points) -> list[Series]:
    """One line for each model and name; the model and its form are said where they differ."""
    models = {(row.model, str(place_of(row)["form"])) for row in report.rows}
    several_models = len({model for model, _ in models}) > 1
    found: dict[str, list[Point]] = {}
    for row in report.rows:
        words = [name(row)]
        form = str(place_of(row)["form"])
        if len({f for _, f in models}) > 1 and form != words[0]:
            words.insert(0, form)
        if several_models:
            words.insert(0, row.model)
        here = found.setdefault(" ".join(words), [])
        spot = point(row)
        if spot is not None:
            here.append(spot)
    return [Series(words, points) for words, points in found.items() if points]


def _notes(report: BenchReport) -> list[str]:
    here = report.environment
    names = ", ".join(dict.fromkeys(f"{row.model} {place_of(row)['form']}" for row in report.rows))
    noisy = any(found.noisy for row in report.rows for found in row.trial.measurements.values())
    about = f"{names}; {here.cpu}, {here.isa}, {_threads(here.threads)}. Bars are 95% intervals of the median."
    lines = [about + (" The machine was not quiet." if noisy else "")]
    left_out = [(row, row.trial.measurements.get("tpot_s")) for row in report.rows]
    lines += [f"{row.trial.name}: {found.reason}." for row, found in left_out if found is not None and found.reason]
    return [part for line in lines for part in wrap(line, NOTE_CHARACTERS)]


def _threads(count: int | None) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


__all__ = [
    "NO_SWEEP", "batch_chart", "kv_chart", "place_of", "prompt_chart", "sweep_chart", "sweep_of", "threads_chart"
]  # fmt: skip
