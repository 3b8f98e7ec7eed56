"""Side by side with llama.cpp, OpenVINO and ONNX Runtime: the same weights and bits, the same threads, interleaved.

    python benchmarks/engines.py examples/shapes/SmolLM2-135M examples/shapes/Llama-3.2-1B --rounds 5 \
        --llama-bench PATH/llama-bench --openvino-python PYTHON --onnxruntime-python PYTHON \
        --json engines.jsonl --table engines.md --plot engines.svg

Each round starts every engine in a fresh process, one after the other and in a turning order, so that a drifting
machine hits all of them. A peer's set-ups (flash attention, repacking; precision hint, kind of weights) are each
tried once on each cell and its best goes into the rounds. Ceilings are probed in every round. Results are appended to
--json as they come; `--only-report` makes table and plot from such a file. A peer without a place is left out.

The peers' Pythons need their package and numpy alone (onnxruntime's also onnx). Random weights of a bare config.json
say what a model costs, never how good it is. Left out: time to the first token, which `trilemma bench` measures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.build import build, sizes_of
from peers.cells import BATCHES, DECODED, DEPTHS, PREFILLS, Cell, Group, groups_of
from peers.engines_of import ENGINES, HERE, KV, EngineFailedError, Files, Setup, run_worker, ways_of
from peers.summary import ceilings_of, figures_of, plot, table, words_of

from trilemma.formats.artifact import load_any
from trilemma.formats.pack import format_bytes
from trilemma.model.config import DecoderConfig
from trilemma.model.cost import decode_bytes_per_token, macs_per_token, prompt_macs

SHAPES = HERE.parent.parent / "examples" / "shapes"
DEFAULT = [SHAPES / name for name in ("stories-15M", "SmolLM2-135M", "llama-316M", "Llama-3.2-1B")]
DEEP = 2048  # prefilling such depths takes longer than decoding there: ways are tried at the first of them


@dataclass
class Book:
    """All rows so far, also appended to a file."""

    path: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, record: str, **about: Any) -> None:
        self.rows.append({"record": record, **about})
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(self.rows[-1]) + "\n")


@dataclass
class Bout:
    """One model in one format, and the engines that still take part."""

    source: Path
    storage: str
    files: Files
    setup: Setup
    config: DecoderConfig
    book: Book
    engines: list[str]
    best: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # (engine, kind of cell) -> way

    @property
    def about(self) -> dict[str, Any]:
        return {"shape": self.source.name, "format": self.storage, "kv": self.setup.kv, "threads": self.setup.threads}

    def play(self, group: Group, rounds: int) -> None:
        for engine in self.engines:
            self._choose(engine, group)
        for turn in range(rounds):
            for engine in [*self.engines[turn % len(self.engines) :], *self.engines[: turn % len(self.engines)]]:
                for way, cells in self._by_way(engine, group):
                    self._run(engine, Group(group.name, cells), way, turn)

    def _choose(self, engine: str, group: Group) -> None:
        """Try every way once and keep the best of each cell; the only way of an engine needs no trial."""
        ways, keys = ways_of(engine, self.storage), [(engine, _kind(cell)) for cell in group.cells]
        if len(ways) == 1 or all(key in self.best for key in keys):
            self.best.update({key: ways[0] for key in keys if key not in self.best})
            return
        found = [(way, self._run(engine, group, way, None)) for way in ways]
        for index, key in enumerate(keys):
            rates = [(max(rates[index]), way) for way, rates in found if rates]
            self.best[key] = max(rates, key=lambda pair: pair[0])[1] if rates else ways[0]

    def _by_way(self, engine: str, group: Group) -> Iterator[tuple[dict[str, Any], tuple[Cell, ...]]]:
        chosen = [(self.best[engine, _kind(cell)], cell) for cell in group.cells]
        for name in dict.fromkeys(json.dumps(way) for way, _ in chosen):
            way = json.loads(name)
            yield way, tuple(cell for own, cell in chosen if own == way)

    def _run(self, engine: str, group: Group, way: dict[str, Any], turn: int | None) -> list[list[float]] | None:
        """One process; its rates, or None where it failed, which is told and written down."""
        began = time.perf_counter()
        try:
            found = ENGINES[engine](self.setup, self.files, self.storage, group, way)
        except EngineFailedError as error:
            self.book.add("failed", **self.about, engine=engine, way=way, group=group.name, reason=str(error))
            _tell(f"{engine} ({words_of(way)}) failed on {group.name}: {error}")
            return None
        rates: list[list[float]] = found.pop("rates")
        for cell, values in zip(group.cells, rates, strict=True):
            self.book.add(
                "trial" if turn is None else "run", **self.about, engine=engine, way=way, round=turn, cell=cell.name,
                rates=values, **self._cost(cell), **{k: v for k, v in found.items() if not isinstance(v, dict)},
            )  # fmt: skip
        what = ", ".join(f"{cell.name}: {max(own):.4g}" for cell, own in zip(group.cells, rates, strict=True))
        when = "trial" if turn is None else f"round {turn + 1}"
        name = f"{self.source.name} {self.storage} {engine} {words_of(way)}".strip()
        _tell(f"{name}, {when}: {what} tokens/s ({time.perf_counter() - began:.0f} s)")
        return rates

    def _cost(self, cell: Cell) -> dict[str, float]:
        """Bytes read and multiplications made for one token of one sequence, on average, with our formats."""
        if cell.kind == "prefill":
            macs = prompt_macs(self.config, cell.tokens) / cell.tokens
            return {"bytes_per_token": self.step_bytes(0) / cell.tokens, "macs_per_token": macs}
        at = cell.depth + cell.tokens // 2
        weights, cache = self.step_bytes(0), self.step_bytes(at) - self.step_bytes(0)
        return {"bytes_per_token": weights / cell.batch + cache, "macs_per_token": macs_per_token(self.config, at)}

    def step_bytes(self, context: int) -> int:
        """Bytes that a step of one sequence reads."""
        shapes = self.config.tensor_shapes()
        return decode_bytes_per_token(
            self.config, lambda name: self.storage if len(shapes[name]) == 2 else "f32", KV[self.setup.kv]["ours"],
            context, format_bytes,
        )  # fmt: skip


def _kind(cell: Cell) -> str:
    """Cells that share the trial of ways."""
    if cell.batch > 1:
        return "batch"
    return "deep" if cell.depth >= DEEP else cell.name


def probe(bout: Bout, program: str | None, rounds: int) -> None:
    """The machine's limits, some tries of a fresh process."""
    size = bout.step_bytes(0)
    task = {"threads": bout.setup.threads, "bytes": size, "program": program, "format": bout.storage}
    for _ in range(rounds):
        bout.book.add("ceilings", **bout.about, bytes=size, **run_worker(sys.executable, "ceilings", task))


def compiled(folder: Path) -> str | None:
    """The probe of the processor's own instructions; None where there is no compiler or another kind of processor."""
    compiler, target = shutil.which("g++") or shutil.which("clang++"), folder / "peak_rates"
    if compiler is None:
        return None
    command = [compiler, "-O3", "-std=c++17", "-pthread", str(HERE / "peak_rates.cpp"), "-o", str(target)]
    return str(target) if subprocess.run(command, capture_output=True, check=False).returncode == 0 else None


def measure(options: argparse.Namespace, folder: Path, book: Book) -> None:
    program = compiled(folder)
    setup = Setup(options.threads, options.kv, options.llama_bench,
                  {"openvino": options.openvino_python, "onnxruntime": options.onnxruntime_python})  # fmt: skip
    for source in options.models or DEFAULT:
        config = load_any(source).config
        plan = list(groups_of(config.max_context, prefills=options.prefill, depths=options.depth,
                              batches=options.batch, decoded=options.decoded, repeats=options.repeats))  # fmt: skip
        for storage in options.formats.split(","):
            _tell(f"{source.name} {storage}: making files")
            files = build(source, storage, folder, setup)
            engines = [name for name in setup.present() if storage != "bf16" or name in ("ours", "llama.cpp")]
            bout = Bout(source, storage, files, setup, config, book, engines)
            book.add("files", **bout.about, **sizes_of(files))
            for group in plan:
                if isinstance(group, Group):
                    probe(bout, program, 1)
                    bout.play(group, options.rounds if "depth" not in group.name else min(options.rounds, 3))
                else:
                    book.add("skipped", **bout.about, cell=group[0], reason=group[1])
            probe(bout, program, 1)
            if not options.work:
                for path in folder.glob(f"{source.name}-{storage}*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def report(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    figures, order = figures_of(rows), list(ENGINES)
    seen = [name for name in order if any(name in one.rates for one in figures)]
    lines = [table(figures, seen), ""]
    for shape, storage in dict.fromkeys((one.shape, one.format) for one in figures):
        found = {name: value / 1e9 for name, value in ceilings_of(rows, shape, storage).items()}
        lines.append(f"{shape} {storage}, ceilings in G/s: " + ", ".join(f"{k[:-6]} {v:.1f}" for k, v in found.items()))
    told = {(row["shape"], row["cell"], row["reason"]): None for row in rows if row["record"] == "skipped"}
    lines += [f"left out: {shape} {cell}: {reason}" for shape, cell, reason in told]
    for row in (row for row in rows if row["record"] == "files"):
        sizes = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in row["bytes"].items())
        lines.append(f"{row['shape']} {row['format']}, weights in MB: {sizes}")
    ways = {
        (one.shape, one.format, one.cell, engine): way for one in figures for engine, way in one.ways.items() if way
    }
    lines += ["", "Set-ups that won: " + "; ".join(f"{' '.join(key)}: {way}" for key, way in ways.items())]
    print("\n".join(lines))
    if options.table:
        options.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for shape in dict.fromkeys(one.shape for one in figures):
        picture = plot([one for one in figures if one.shape == shape], seen, f"{shape}: engines beside the ceilings")
        if options.plot and picture:
            options.plot.with_name(f"{options.plot.stem}-{shape}.svg").write_text(picture, encoding="utf-8")


def main() -> None:
    options = _parser().parse_args()
    if options.only_report:
        report(options, [json.loads(line) for line in options.json.read_text(encoding="utf-8").splitlines()])
        return
    book = Book(options.json)
    try:
        if options.work:
            options.work.mkdir(parents=True, exist_ok=True)
            measure(options, options.work, book)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                measure(options, Path(scratch), book)
    except KeyboardInterrupt:
        _tell("stopped; the report is of what was measured until now")
    report(options, book.rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda words: [int(word) for word in words.split(",") if word]  # noqa: E731
    listed = lambda values: ",".join(map(str, values))  # noqa: E731
    parser.add_argument(
        "models", nargs="*", type=Path, help="config.json folders or checkpoints; four shapes by default"
    )
    parser.add_argument("--formats", default="int4-g32,int8-g32", help="also bf16")
    parser.add_argument(
        "--prefill", type=numbers, default=list(PREFILLS), help=f"lengths, {listed(PREFILLS)}; '' for none"
    )
    parser.add_argument("--depth", type=numbers, default=list(DEPTHS), help=f"decode at these, {listed(DEPTHS)}")
    parser.add_argument("--batch", type=numbers, default=list(BATCHES), help=f"decode of as many, {listed(BATCHES)}")
    parser.add_argument("--decoded", type=int, default=DECODED, help="tokens of a decode")
    parser.add_argument("--kv", choices=list(KV), default="16", help="bits of the cache")
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
    parser.add_argument("--only-report", action="store_true", help="table and plot of --json, nothing measured")
    return parser


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
