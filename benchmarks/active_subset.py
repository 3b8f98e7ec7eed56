"""Active subset or smaller model: experts made of a dense model beside that model pruned, at equal quality and time.

Every version is built from one model with the same calibration text, stored alike, and measured in one interleaved
run: bytes kept, bytes read for a token, time, energy, and quality on other text. Between its points each
family is interpolated (logarithms of KL, time and energy; by repetition, so that intervals of times hold pairs).
Then shapes of larger models with random weights, where the weights no longer lie in a cache: cost alone.

    python benchmarks/active_subset.py --work out/active-subset --plot docs/guides/images/active-subset.svg

Built versions stay in --work and are taken from there the next time. Left out: training afterwards, which helps both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from trilemma.core.measurement import Measurement
from trilemma.core.quantity import format_percent, format_quantity
from trilemma.data.documents import read_documents
from trilemma.formats.artifact import load_any
from trilemma.measure.bench import BenchCandidate, decode_bytes
from trilemma.measure.compare import compare
from trilemma.measure.results import CompareResult, CompareRow
from trilemma.measure.stats import Interval, median_interval, paired_ratio
from trilemma.measure.timing.batch_sweep import batch_sweep
from trilemma.model.config import Experts
from trilemma.model.tokenizer import Tokenizer
from trilemma.report.plot import Axis, Chart, Point, Series, chart_row, check_plot_path, write_plot
from trilemma.runtime.engine import EngineOptions
from trilemma.techniques.apply import compress
from trilemma.techniques.calibration_text import calibration_windows
from trilemma.techniques.cost_twin import cost_twin
from trilemma.techniques.schemes import scheme_to_recipe

FAMILIES: dict[str, tuple[str, ...]] = {
    "experts, ¼ shared": tuple(f"experts8x{active}" for active in (7, 6, 5, 4, 3, 2, 1)),
    "experts, ½ shared": tuple(f"experts8x{active}-s50" for active in (6, 4, 2)),
    "narrower FFN": ("ffn12", "ffn25", "ffn38", "ffn50"),
    "fewer layers": ("layers17", "layers33"),
    "narrower, then experts": ("ffn25+experts8x4",),
}
EXPERTS, PRUNED = "experts, ¼ shared", "narrower FFN"
TWINS = ("experts8x4", "experts8x2")  # beside each, channels removed until as many run


def main(
    model: Annotated[Path, typer.Option(help="model to change")] = Path("examples/models/hearth-7m"),
    text: Annotated[Path, typer.Option(help="first half calibrates, second half measures")] = Path(
        "examples/texts/children.txt"
    ),
    storage: Annotated[str, typer.Option(help="scheme that every version is stored in")] = "W8A8-g32",
    shapes: Annotated[str, typer.Option(help="larger shapes for cost alone, comma-separated; empty for none")] = (
        "examples/shapes/SmolLM2-135M,examples/shapes/Llama-3.2-1B"
    ),
    shape_storage: Annotated[str, typer.Option(help="scheme of the larger shapes")] = "W4A8-g32",
    work: Annotated[Path, typer.Option(help="folder of the built versions")] = Path("out/active-subset"),
    windows: Annotated[int, typer.Option(help="calibration windows of 512 tokens")] = 32,
    eval_tokens: Annotated[int, typer.Option(help="tokens of text measured on")] = 16_384,
    repetitions: Annotated[int, typer.Option(help="timed ones, interleaved")] = 15,
    shape_repetitions: Annotated[int, typer.Option(help="of the larger shapes")] = 5,
    threads: Annotated[int, typer.Option(help="of the engine")] = 1,
    jsonl: Annotated[Path | None, typer.Option(help="append one JSON line a row")] = None,
    plot: Annotated[Path | None, typer.Option(help="write the picture")] = None,
) -> None:
    """Build, measure, print the tables."""
    check_plot_path(plot)
    work.mkdir(parents=True, exist_ok=True)
    built, measured_on = build_all(model, text, storage, work, windows)
    options = EngineOptions(threads=threads)
    result = compare(
        {"unmodified": model, **built}, measured_on, max_tokens=eval_tokens, prompt_tokens=128, output_tokens=64,
        repetitions=repetitions, options=options,
    )  # fmt: skip
    rows = {row.name: row for row in result.rows}
    dense = rows.pop(storage)
    lines = [quality_line(name, rows[name], dense, result, built[name]) for name in built if name != storage]
    print_quality(lines, dense, result)
    equal = equal_quality(rows, dense) + equal_time(rows, dense) + equal_reads(lines, dense, built[storage])
    for line in equal:
        print(f"- {line['words']}")
    lines += equal
    for shape in filter(None, shapes.split(",")):
        lines += cost_of_shape(Path(shape), shape_storage, shape_repetitions, options)
    if jsonl is not None:
        with jsonl.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"benchmark": "active-subset", **line}) + "\n" for line in lines)
    if plot is not None:
        write_plot(plot, picture(rows, dense))


def build_all(model: Path, text: Path, storage: str, work: Path, windows: int) -> tuple[dict[str, Path], Path]:
    """Artifacts by scheme (the dense one first), and the file of text to measure on."""
    documents = [document.text for document in read_documents(text)]
    halves = (documents[: len(documents) // 2], documents[len(documents) // 2 :])
    files = (work / "calibrate.txt", work / "measure.txt")
    for file, half in zip(files, halves, strict=True):
        file.write_text("".join(f"{item}\n<|endoftext|>\n" for item in half), encoding="utf-8")
    found, _ = calibration_windows(
        read_documents(files[0]), Tokenizer.load(model), 512, seed=0, part="all", prepare="none", windows=windows
    )
    built: dict[str, Path] = {}
    for part in ("", *(name for family in FAMILIES.values() for name in family)):
        scheme = f"{part}+{storage}" if part else storage
        built[part or storage] = target = work / scheme
        if not (target / "recipe.yaml").exists():
            done = compress(model, target, scheme=scheme, calibration=found, threads=1, force=True)
            typer.echo(f"{scheme}: built in {done.seconds:.0f} s", err=True)
    return built, files[1]


def value_of(row: CompareRow, metric: str) -> float:
    found = row.measurements[metric].value
    assert found is not None, f"{metric} of {row.name} is unavailable"
    return found


def times_of(row: CompareRow, metric: str) -> np.ndarray:
    return np.asarray(row.measurements[metric].samples, dtype=np.float64)


def read_bytes(path: Path) -> int:
    """Bytes that a step at position 160 reads: the middle of the timed answers."""
    return decode_bytes(load_any(path), "bf16", 160)


def quality_line(name: str, row: CompareRow, dense: CompareRow, result: CompareResult, path: Path) -> dict[str, Any]:
    """Everything known of one version."""
    energy = row.measurements["energy_j_per_output_token"]
    line: dict[str, Any] = {
        "version": name, "weights_bytes": value_of(row, "weights_bytes"), "read_bytes": read_bytes(path),
        "energy_j": energy.value, "energy_source": energy.source, "noisy": row.measurements["tpot_s"].noisy,
        "environment": result.environment.model_dump(mode="json"),
    }  # fmt: skip
    for metric in ("kl_mean", "ppl_increase"):
        line |= {metric: value_of(row, metric), f"{metric}_ci95": row.measurements[metric].ci95}
    for metric in ("tpot_s", "ttft_s"):
        ratio = paired_ratio(dense.measurements[metric].samples, row.measurements[metric].samples)
        line |= {metric: value_of(row, metric), f"{metric}_ratio": (ratio.value, *(ratio.ci95 or (None, None)))}
    return line


def print_quality(lines: Sequence[dict[str, Any]], dense: CompareRow, result: CompareResult) -> None:
    typer.echo(
        f"\nDense: {format_quantity(value_of(dense, 'weights_bytes'), 'bytes')}, "
        f"{format_quantity(value_of(dense, 'tpot_s'), 's')} a token, KL {value_of(dense, 'kl_mean'):.5f}; "
        f"{result.environment.cpu}, {result.environment.isa}, {result.environment.threads} thread(s).\n"
    )
    print("| version | weights | read for a token | KL | perplexity | time a token | first token | energy a token |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for line in lines:
        energy = line["energy_j"] / value_of(dense, "energy_j_per_output_token")
        print(
            f"| `{line['version']}` | {format_quantity(line['weights_bytes'], 'bytes')} | "
            f"{format_quantity(line['read_bytes'], 'bytes')} | {line['kl_mean']:.4f} | "
            f"{format_percent(line['ppl_increase'], signed=True)} | {share(line['tpot_s_ratio'])} | "
            f"{share(line['ttft_s_ratio'])} | x{energy:.2f}{' ~' if line['energy_source'] == 'estimated' else ''} |"
        )
    print("\nTimes and energies beside the dense model, paired by repetition; ~ is estimated.\n")


def share(ratio: tuple[float, float | None, float | None]) -> str:
    value, low, high = ratio
    return f"x{value:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else "")


def curve(rows: dict[str, CompareRow], family: str, dense: CompareRow) -> list[CompareRow]:
    """The family's versions from the mildest on, the dense model before them."""
    return [dense, *(rows[name] for name in FAMILIES[family])]


def interpolated(points: Sequence[CompareRow], kl: float, metric: str, repetition: int | None) -> float:
    """A metric of a family where its KL is `kl`, in logarithms; of one repetition, or of the final values."""
    quality = [math.log(value_of(row, "kl_mean")) for row in points]
    costs = [value_of(row, metric) if repetition is None else times_of(row, metric)[repetition] for row in points]
    order = np.argsort(quality)
    return float(np.exp(np.interp(math.log(kl), np.asarray(quality)[order], np.log(costs)[order])))


def equal_quality(rows: dict[str, CompareRow], dense: CompareRow) -> list[dict[str, Any]]:
    """Experts at the KL of each pruned version: bytes, times and energy, experts over pruned."""
    found = []
    points = curve(rows, EXPERTS, dense)
    worst = max(value_of(row, "kl_mean") for row in points)
    for name in FAMILIES[PRUNED]:
        pruned = rows[name]
        kl = value_of(pruned, "kl_mean")
        if kl > worst:
            continue
        line: dict[str, Any] = {"equal": "quality", "version": name, "kl_mean": kl}
        for metric in ("weights_bytes", "energy_j_per_output_token"):
            ratio = interpolated(points, kl, metric, None) / value_of(pruned, metric)
            line[metric] = (ratio, None, None)
        for metric in ("tpot_s", "ttft_s"):
            ratios = [interpolated(points, kl, metric, i) / t for i, t in enumerate(times_of(pruned, metric))]
            line[metric] = triple(median_interval(ratios))
        line["words"] = (
            f"At the KL of `{name}` ({kl:.4f}) experts need {share(line['weights_bytes'])} of its memory, "
            f"{share(line['tpot_s'])} of its time a token, {share(line['ttft_s'])} of its time to the first, "
            f"{share(line['energy_j_per_output_token'])} of its energy."
        )
        found.append(line)
    return found


def equal_time(rows: dict[str, CompareRow], dense: CompareRow) -> list[dict[str, Any]]:
    """KL of experts at the time a token of each pruned version, experts over pruned."""
    found = []
    points = curve(rows, EXPERTS, dense)
    quality = np.log([value_of(row, "kl_mean") for row in points])
    times = np.stack([times_of(row, "tpot_s") for row in points])  # (versions, repetitions)
    for name in FAMILIES[PRUNED]:
        own = times_of(rows[name], "tpot_s")
        if np.median(own) < np.median(times, axis=1).min():
            found.append({"equal": "time", "version": name, "words": f"No experts are as fast as `{name}`."})
            continue
        ratios = []
        for repetition, seconds in enumerate(own):
            order = np.argsort(times[:, repetition])
            kl = np.exp(np.interp(seconds, times[order, repetition], quality[order]))
            ratios.append(kl / value_of(rows[name], "kl_mean"))
        line: dict[str, Any] = {"equal": "time", "version": name, "kl_mean": triple(median_interval(ratios))}
        line["words"] = f"At the time of `{name}` experts have {share(line['kl_mean'])} of its KL."
        found.append(line)
    return found


def equal_reads(lines: Sequence[dict[str, Any]], dense: CompareRow, path: Path) -> list[dict[str, Any]]:
    """KL of experts where a token reads as many bytes as of each pruned version: what a memory-bound device sees."""
    by_name = {line["version"]: line for line in lines}
    points = sorted((by_name[name]["read_bytes"], math.log(by_name[name]["kl_mean"])) for name in FAMILIES[EXPERTS])
    points.append((max(points[-1][0] + 1, read_bytes(path)), math.log(value_of(dense, "kl_mean"))))
    found = []
    for name in FAMILIES[PRUNED]:
        own = by_name[name]
        kl = math.exp(float(np.interp(own["read_bytes"], [reads for reads, _ in points], [log for _, log in points])))
        line: dict[str, Any] = {"equal": "read_bytes", "version": name, "kl_mean": (kl / own["kl_mean"], None, None)}
        line["words"] = f"Where a token reads as much as of `{name}` experts have {share(line['kl_mean'])} of its KL."
        found.append(line)
    return found


def triple(interval: Interval) -> tuple[float, float | None, float | None]:
    return (interval.value, interval.low, interval.high)


def cost_of_shape(path: Path, storage: str, repetitions: int, options: EngineOptions) -> list[dict[str, Any]]:
    """Random weights in the shape of a larger model: dense, and experts beside pruning at the same active share."""
    shape = load_any(path)
    twins = {"dense": cost_twin(shape, scheme_to_recipe(storage))}
    for experts in TWINS:
        twins[experts] = cost_twin(shape, scheme_to_recipe(f"{experts}+{storage}"))
        spec = twins[experts].config.layers[0].ffn
        assert isinstance(spec, Experts)
        idle = (spec.count - spec.active) * spec.hidden / (spec.count * spec.hidden + spec.shared_hidden)
        pruned = f"ffn{100 * idle:.0f}-even"
        twins[pruned] = cost_twin(shape, scheme_to_recipe(f"{pruned}+{storage}"))
    result = compare(twins, prompt_tokens=32, output_tokens=8, repetitions=repetitions, options=options)
    rows = {row.name: row for row in result.rows}
    batched = batch_sweep(
        [BenchCandidate(path.name, name, twin, options) for name, twin in twins.items()], batches=(8,), prompt_tokens=4,
        output_tokens=4, repetitions=max(3, repetitions // 2),
    )  # fmt: skip
    steps = {name: row.trial.measurements["tpot_s"] for name, row in zip(twins, batched.rows, strict=True)}
    print(f"\n{path.name}, {storage}, random weights:\n")
    print(
        "| version | weights | read for a token | time a token | energy a token | first token | step of 8 sequences |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    lines = [shape_line(path.name, name, rows, steps, decode_bytes(twins[name], "bf16", 36)) for name in twins]
    for line in lines:
        print(
            f"| `{line['version']}` | {format_quantity(line['weights_bytes'], 'bytes')} | "
            f"{format_quantity(line['read_bytes'], 'bytes')} | {share(line['tpot_s_ratio'])} | "
            f"x{line['energy_ratio']:.2f} | {share(line['ttft_s_ratio'])} | {share(line['batch_8_ratio'])} |"
        )
    return lines


def shape_line(
    shape: str, name: str, rows: dict[str, CompareRow], steps: dict[str, Measurement], reads: int
) -> dict[str, Any]:
    dense, row = rows["dense"], rows[name]
    line: dict[str, Any] = {
        "shape": shape, "version": name, "weights_bytes": value_of(row, "weights_bytes"), "read_bytes": reads,
        "energy_ratio": value_of(row, "energy_j_per_output_token") / value_of(dense, "energy_j_per_output_token"),
        "batch_8_ratio": triple(paired_ratio(steps["dense"].samples, steps[name].samples)),
        "noisy": row.measurements["tpot_s"].noisy,
    }  # fmt: skip
    for metric in ("tpot_s", "ttft_s"):
        ratio = paired_ratio(dense.measurements[metric].samples, row.measurements[metric].samples)
        line |= {metric: value_of(row, metric), f"{metric}_ratio": triple(ratio)}
    return line


def picture(rows: dict[str, CompareRow], dense: CompareRow) -> str:
    """KL against memory and against time, a line for each family."""
    by_time, by_memory = [], []
    for family, names in FAMILIES.items():
        time_points, memory_points = [], []
        for name in names:
            row = rows[name]
            kl, ci95 = value_of(row, "kl_mean"), row.measurements["kl_mean"].ci95
            ratio = paired_ratio(dense.measurements["tpot_s"].samples, row.measurements["tpot_s"].samples)
            time_points.append(Point(ratio.value, kl, ci95, ratio.ci95))
            memory_points.append(Point(value_of(row, "weights_bytes"), kl, ci95))
        by_time.append(Series(family, time_points))
        by_memory.append(Series(family, memory_points))
    return chart_row(
        [
            Chart(by_memory, Axis("weights in memory", "bytes"), Axis("KL to the original, nats", log=True), "memory"),
            Chart(by_time, Axis("time a token beside the dense model", "ratio"), Axis("", log=True), "time"),
        ],
        title="Use part of the weights, or remove part of them",
    )


if __name__ == "__main__":
    typer.run(main)
