"""Side by side with llama.cpp, OpenVINO and ONNX Runtime: the same weights and bits, the same threads, interleaved.

    python benchmarks/engines.py examples/shapes/Llama-3.2-1B examples/shapes/SmolLM2-135M --rounds 5 \
        --llama-bench PATH/llama-bench --openvino-python PYTHON --onnxruntime-python PYTHON --work FOLDER \
        --json engines.jsonl --table engines.md --plot engines.svg --minutes 60

Each round starts every engine in a fresh process, one after the other and in a turning order, so that a drifting
machine hits all of them. A peer's set-ups (flash attention, repacking, memory map, part sizes; precision hint, kind of
weights, groups of activations) are tried before its best takes part; ours runs as it is by default. Ceilings are
probed in every round.

The whole matrix takes hours. What matters most comes first (see `peers/cells.py`), important cells get their later
rounds before others their first, `--minutes` ends it, and a run with the same --json carries on: what is in the file
is not measured again. `--merge` makes table, plot and `--bars` of several files, without measuring. Formats: ours
(int4-g32, int8-g32, bf16, f32; `-a16` behind the first two: our inputs in bf16) with every engine that holds them;
types of GGUF (Q4_K_M, Q6_K, ...) beside llama.cpp.

The peers' Pythons need their package and numpy alone (onnxruntime's also onnx). Random weights of a bare config.json
say what a model costs, never how good it is; it gets the room that the cells need. Without --work the files of all
models are made anew and kept until the end: 12 GB for the four shapes in two formats.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.bars import bars_table
from peers.book import Book, read_rows
from peers.bout import Bout, tell
from peers.build import build, sizes_of, stretched
from peers.cells import BATCHES, DECODED, DEPTHS, PREFILLS, Group, groups_of
from peers.engines_of import ENGINES, HERE, KV, EngineFailedError, Setup
from peers.summary import Figure, ceilings_of, figures_of, plot, table

from trilemma.core.errors import InputError, TrilemmaError
from trilemma.formats.artifact import load_any

SHAPES = HERE.parent.parent / "examples" / "shapes"
DEFAULT = [SHAPES / name for name in ("Llama-3.2-1B", "SmolLM2-135M", "llama-316M", "stories-15M")]
LATER = 1.0  # rounds that a cell of one rank less waits for


@dataclass(frozen=True)
class Task:
    """One group of one model in one format with one kind of cache, in one round."""

    source: Path
    storage: str
    kv: str
    group: Group
    turn: int
    place: int  # of model, format and cache as they were asked for

    @property
    def key(self) -> tuple[Path, str, str]:
        return self.source, self.storage, self.kv

    @property
    def order(self) -> tuple[float, int, int, int]:
        rank = self.group.rank + (self.kv != "16" and self.group.rank < 2)
        return self.turn + LATER * rank, rank, self.place, self.turn


def compiled(folder: Path) -> str | None:
    """The probe of the processor's own instructions; None where there is no compiler or another kind of processor."""
    compiler, target = shutil.which("g++") or shutil.which("clang++"), folder / "peak_rates"
    if compiler is None:
        return None
    command = [compiler, "-O3", "-std=c++17", "-pthread", str(HERE / "peak_rates.cpp"), "-o", str(target)]
    return str(target) if subprocess.run(command, capture_output=True, check=False).returncode == 0 else None


def plan(options: argparse.Namespace, folder: Path, book: Book) -> list[Task]:
    """All tasks, what matters most first."""
    found = []
    longest = max([*(depth + options.decoded for depth in options.depth), *options.prefill], default=0) + 8
    cases = [(source, storage, kv) for storage in options.formats.split(",") for source in options.models or DEFAULT
             for kv in options.kv.split(",")]  # fmt: skip
    for place, (source, storage, kv) in enumerate(cases):
        roomy = stretched(source, folder, longest)
        groups = groups_of(load_any(roomy).config.max_context, prefills=options.prefill, depths=options.depth,
                           batches=options.batch, decoded=options.decoded, repeats=options.repeats,
                           opening=options.opening and kv == "16")  # fmt: skip
        for group in groups:
            if isinstance(group, Group):
                rounds = options.rounds if group.name != "depth" else min(options.rounds, 3)
                found += [Task(roomy, storage, kv, group, turn, place) for turn in range(rounds)]
            else:
                book.add("skipped", shape=source.name, format=storage, kv=kv, cell=group[0], reason=group[1])
    return sorted(found, key=lambda task: task.order)


def measure(options: argparse.Namespace, folder: Path, book: Book) -> None:
    began, limit_s = time.monotonic(), options.minutes * 60 if options.minutes else float("inf")
    program = compiled(folder)
    bouts: dict[tuple[Path, str, str], Bout | None] = {}
    probed: set[tuple[object, ...]] = set()
    for task in plan(options, folder, book):
        if task.key not in bouts:
            bouts[task.key] = open_bout(options, task, folder, book)
        bout = bouts[task.key]
        if bout is None or bout.is_done(task.group, task.turn):
            continue
        left_s = limit_s - (time.monotonic() - began)
        if bout.seconds(task.group) > left_s or left_s <= 0:
            tell(f"out of time before {bout.shape} {bout.storage} {task.group.name}, round {task.turn + 1}")
            if left_s <= 0:
                return
            continue
        depth = max(cell.depth for cell in task.group.cells) if task.group.name == "depth" else 0
        if (*task.key, task.turn, depth) not in probed:
            probed.add((*task.key, task.turn, depth))
            bout.probe(program, depth)
        bout.play(task.group, task.turn)


def open_bout(options: argparse.Namespace, task: Task, folder: Path, book: Book) -> Bout | None:
    """Make the files; None where that is not possible, which is told and written down."""
    setup = Setup(options.threads, task.kv, options.llama_bench,
                  {"openvino": options.openvino_python, "onnxruntime": options.onnxruntime_python})  # fmt: skip
    about = {"shape": task.source.name, "format": task.storage, "kv": task.kv, "threads": options.threads}
    tell(f"{task.source.name} {task.storage} kv {task.kv}: making files")
    try:
        files = build(task.source, task.storage, folder, setup)
        bout = Bout(
            task.source.name, task.storage, files, setup, book, setup.present(task.storage), not options.no_trials
        )
        bout.step_bytes(1)  # a cache that our account does not know would end every measurement
    except (EngineFailedError, InputError) as error:
        book.add("failed", **about, engine="", way={}, group="files", reason=str(error))
        tell(str(error))
        return None
    book.add("files", **about, **sizes_of(files))
    return bout


def report(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    figures, order = figures_of(rows), list(ENGINES)
    seen = [name for name in order if any(name in one.rates for one in figures)]
    lines = [table(figures, seen), ""]
    for shape, storage in dict.fromkeys((one.shape, one.format) for one in figures):
        found = {name: value / 1e9 for name, value in ceilings_of(rows, shape, storage).items()}
        lines.append(f"{shape} {storage}, ceilings in G/s: " + ", ".join(f"{k[:-6]} {v:.1f}" for k, v in found.items()))
    lines += _notes(rows, figures)
    print("\n".join(lines))
    if options.table:
        options.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for shape in dict.fromkeys(one.shape for one in figures):
        picture = plot([one for one in figures if one.shape == shape], seen, f"{shape}: engines beside the ceilings")
        if options.plot and picture:
            options.plot.with_name(f"{options.plot.stem}-{shape}.svg").write_text(picture, encoding="utf-8")


def _notes(rows: Sequence[dict[str, Any]], figures: Sequence[Figure]) -> Iterator[str]:
    """What the table does not say: cells left out, failures, sizes, the peers' best set-ups."""
    left = [(row["shape"], row["cell"], row["reason"]) for row in rows if row["record"] == "skipped"]
    yield from dict.fromkeys(f"left out: {shape} {cell}: {reason}" for shape, cell, reason in left)
    for row in (row for row in rows if row["record"] == "failed"):
        yield f"failed: {row['shape']} {row['format']} {row['engine']} {row['group']}: {row['reason'][-200:]}"
    sizes = {(row["shape"], row["format"]): row["bytes"] for row in rows if row["record"] == "files"}
    for (shape, storage), held in sizes.items():
        words = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in held.items())
        yield f"{shape} {storage}, weights in MB: {words}"
    yield ""
    yield "Set-ups that won:"
    for one in figures:
        won = "; ".join(f"{engine} {way}" for engine, way in one.ways.items() if way)
        if won:
            yield f"- {one.shape} {one.format} kv {one.kv} {one.cell}: {won}"


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if unknown := set(options.kv.split(",")) - set(KV):
        parser.error(f"--kv {','.join(sorted(unknown))} is no kind of cache; choose of {', '.join(KV)}")
    if missing := [str(path) for path in options.merge if not path.is_file()]:
        parser.error(f"--merge {' '.join(missing)}: no such file; give files that --json of earlier runs wrote")
    if options.merge or options.only_report or options.bars:
        rows = read_rows([*([options.json] if options.json and options.json.exists() else []), *options.merge])
    else:
        book = Book(options.json)
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.work or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                measure(options, folder, book)
            except KeyboardInterrupt:
                tell("stopped; the report is of what was measured until now")
        rows = book.rows
    if options.bars:
        print(bars_table(rows))
    else:
        report(options, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda words: [int(word) for word in words.split(",") if word]  # noqa: E731
    listed = lambda values: ",".join(map(str, values))  # noqa: E731
    parser.add_argument(
        "models", nargs="*", type=Path, help="config.json folders or checkpoints; four shapes by default"
    )
    parser.add_argument(
        "--formats",
        default="int4-g32,int8-g32",
        help="also int4-g32-a16 (our inputs in bf16), bf16, f32, and types of GGUF: Q4_K_M",
    )
    parser.add_argument(
        "--prefill", type=numbers, default=list(PREFILLS), help=f"lengths, {listed(PREFILLS)}; '' for none"
    )
    parser.add_argument("--depth", type=numbers, default=list(DEPTHS), help=f"decode at these, {listed(DEPTHS)}")
    parser.add_argument("--batch", type=numbers, default=list(BATCHES), help=f"decode of as many, {listed(BATCHES)}")
    parser.add_argument(
        "--opening",
        action="store_true",
        help="from file to first token too, warm and cold; llama.cpp in the Python that TRILEMMA_LLAMA_CPP names",
    )
    parser.add_argument("--decoded", type=int, default=DECODED, help="tokens of a decode")
    parser.add_argument("--kv", default="16", help=f"bits of the cache, several with commas: {', '.join(KV)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="at most 3 at depths that take long to fill")
    parser.add_argument("--repeats", type=int, default=2, help="within a process, after a warm-up")
    parser.add_argument(
        "--llama-bench", default=None, help="llama.cpp's tool; batches need llama-batched-bench beside it"
    )
    parser.add_argument("--openvino-python", default=None, help="an interpreter that has openvino")
    parser.add_argument("--onnxruntime-python", default=None, help="an interpreter that has onnxruntime and onnx")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, help="an .svg name; the model's name goes behind it")
    parser.add_argument(
        "--work", type=Path, default=None, help="keep the models made here, and use those that are there"
    )
    parser.add_argument("--minutes", type=float, default=None, help="start nothing more after so long")
    parser.add_argument("--no-trials", action="store_true", help="run each peer in its default set-up")
    parser.add_argument("--merge", nargs="*", type=Path, default=[], help="report of these files and --json together")
    parser.add_argument("--bars", action="store_true", help="what must be reached and what was, of --json and --merge")
    parser.add_argument("--only-report", action="store_true", help="table and plot of --json, nothing measured")
    return parser


if __name__ == "__main__":
    try:
        main()
    except TrilemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; a run with the same --json carries on", file=sys.stderr)
        sys.exit(130)
