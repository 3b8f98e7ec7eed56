"""Quality per byte: ours beside llama.cpp's types made with an importance matrix of the very same calibration text.

    python examples/make_spiky.py examples/models/hearth-7m out/hearth-spiky
    python benchmarks/quality_per_byte.py examples/models/hearth-7m out/hearth-spiky --calibrate TEXT --judge OTHER \\
        --llama-tools FOLDER --work out/quality --json quality.jsonl --table quality.md

For each model: llama.cpp's quantization to each type, run by llama.cpp; our schemes, run by our engine; both held
against the f32 logits of the unquantized model, token by token, on windows of a text that calibrated nothing. At the
bytes of each type stands the one of ours that loses least on windows of a third kind, which neither calibrate nor
judge; once more among those whose embedding and head have the type's own bits. Then Q4_0 made by us and by llama.cpp,
the same types tensor by tensor, both run by llama.cpp; and 8- and 4-bit KV caches against the 16-bit one.

Ratios of mean KL are paired by window, with a bootstrap interval. `--speed-rounds` adds decode, both sides in fresh
processes in turn, llama.cpp in the best of its set-ups. A run with the same --json goes on where it stopped;
`--again WORD` computes rows anew whose name holds WORD, and `--again ours` all of ours. `--only-report` computes
nothing. llama.cpp runs as the engine 'llama.cpp' does (TRILEMMA_LLAMA_CPP names a Python that has it).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kl_settings import divergence
from quality.llama_cpp import FORMAT_OF, TYPES, Tools, counted, formats_like, tensor_bytes, types_in
from quality.recipes import read_word, with_ends, with_formats
from quality.speed import decode_rates
from quality.verdicts import HEAD, PAIRS, Bout, bouts_of, kv_lines
from quality.yard import Float64, Yard, make_yard, read_text

from trilemma.core.errors import InputError, TrilemmaError
from trilemma.core.recipe import Recipe
from trilemma.export.gguf import export_gguf
from trilemma.formats.artifact import load_any, write_artifact
from trilemma.formats.artifact_record import weights_bytes
from trilemma.model.model import Model
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.technique import Build

Row = dict[str, Any]
BARS = {"Q6_K": 1.0, "Q5_K_M": 0.7, "Q4_K_M": 0.7, "Q3_K_M": 0.7, "Q2_K": 0.7, "Q4_0": 1.0}
KV_BARS = {"int8": 0.001, "int4": 0.02}
EXPORTED_BAR = 0.7
OURS = (
    "W8A8-g32",
    "guided:int5-g32/int6-g16-k+scales100",
    "guided:int4-g32-k/int6-g16-k+scales100",
    "guided:int4-g64/int5-g32-k+scales100",
    "guided:int3-g16-k/int6-g16-k+scales100",
    "guided:int3-g16-k/int4-g32-k+scales100",
    "guided:int2-g16-k/int6-g16-k+scales100",
)
EXPORTED = ("W4A8-g32-guided+scales100",)
LIKE = "Q4_0"


@dataclass
class Bench:
    """Rows of one JSON lines file and what computes those that are missing."""

    yard: Yard
    tools: Tools | None
    work: Path
    path: Path | None
    rows: list[Row]
    again: Sequence[str] = ()

    def row(self, side: str, name: str, compute: Callable[[], Row], **about: Any) -> Row:
        """The finished row, or a computed one, which is written down at once."""
        case = {"yard": self.yard.key, "model": self.yard.name, "side": side, "name": name, **about}
        found = [row for row in self.rows if all(row.get(key) == value for key, value in case.items())]
        wanted = any(word in (side, "ours" if side == "exported" else side) or word in name for word in self.again)
        if found and not (wanted and not found[-1].get("fresh")):
            return found[-1]
        began = time.monotonic()
        row = {**case, **compute(), "seconds": round(time.monotonic() - began, 1), "at": time.time()}
        self.rows[:] = [old for old in self.rows if old not in found] + [row | {"fresh": True}]
        shown = {key: row[key] for key in ("bytes", "kl", "ours", "theirs", "seconds") if key in row}
        print(f"{row['model']} {side} {name}: {shown}", file=sys.stderr, flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
        return row

    def llama_cpp(self, kind: str) -> Row:
        assert self.tools is not None
        path = self.tools.quantized(self.yard, kind)
        types = types_in(path, load_any(self.yard.model).config)

        def compute() -> Row:
            engine = open_engine(path, runtime="llama.cpp", options=self.yard.options())
            head = types.get("head.weight", types["embedding.weight"])
            ends = f"{FORMAT_OF.get(types['embedding.weight'], '?')}/{FORMAT_OF.get(head, '?')}"
            return {"bytes": tensor_bytes(path), "ends": ends, "types": counted(types),
                    **_figures(*self.yard.divergences(engine))}  # fmt: skip

        return self.row("llama.cpp", kind, compute)

    def ours(self, recipe: Recipe, name: str) -> Row:
        def compute() -> Row:
            made, seconds = self.make(recipe)
            write_artifact(made, self.artifact(name), recipe)
            shapes = made.config.tensor_shapes()
            ends = [made.format_of(end if end in shapes else "embedding.weight")
                    for end in ("embedding.weight", "head.weight")]  # fmt: skip
            engine = open_engine(made, options=self.yard.options())
            return {"bytes": weights_bytes(made), "ends": "/".join(ends), "build_s": seconds,
                    **_figures(*self.yard.divergences(engine))}  # fmt: skip

        return self.row("ours", name, compute)

    def artifact(self, name: str) -> Path:
        """Where one of ours is kept, for its speed."""
        return self.work / f"{self.yard.name}-{self.yard.key}-{re.sub(r'[^A-Za-z0-9.+-]+', '_', name)}"

    def speed(self, bout: Bout, bench: Path, rounds: int) -> None:
        """Decode of the two sides of a bout, once for each pair."""
        assert self.tools is not None
        assert bout.ours is not None
        ours, theirs = str(bout.ours["name"]), str(bout.theirs["name"])
        if not self.artifact(ours).exists():
            raise InputError(f"'{ours}' was not kept in '{self.work}'. Make it again: --again '{ours}'.")
        paths = self.artifact(ours), self.tools.quantized(self.yard, theirs)
        self.row("speed", ours, lambda: decode_rates(*paths, bench, self.yard.threads, rounds), against=theirs)

    def exported(self, recipe: Recipe, like: str, bar: float) -> Row:
        """Ours in the types of llama.cpp's file, exported, and run by llama.cpp."""
        assert self.tools is not None
        types = types_in(self.tools.quantized(self.yard, like), load_any(self.yard.model).config)

        def compute() -> Row:
            made, seconds = self.make(with_formats(recipe, formats_like(types)))
            path = self.tools.work / f"{self.yard.name}-{like}-ours.gguf"  # type: ignore[union-attr]
            export_gguf(made, path)
            exported = types_in(path, made.config)
            if exported != types:
                raise SystemExit(f"error: types differ: {set(exported.items()) ^ set(types.items())}")
            engine = open_engine(path, runtime="llama.cpp", options=self.yard.options())
            return {"bytes": tensor_bytes(path), "ends": "", "like": like, "bar": bar, "build_s": seconds,
                    "types": counted(exported), **_figures(*self.yard.divergences(engine))}  # fmt: skip

        return self.row("exported", f"{recipe.name} as {like}", compute)

    def caches(self, scheme: str) -> Iterator[Row]:
        """KL of smaller KV caches against the 16-bit one of the same model in the same engine."""
        held: list[Model] = []

        def compute(kv: str) -> Row:
            if not held:
                held.append(self.make(read_word(scheme, self.yard.name) or Recipe())[0])
            engines = [open_engine(held[0], options=EngineOptions(**(vars(self.yard.options()) | {"kv_cache": cache})))
                       for cache in ("bf16", kv)]  # fmt: skip
            try:
                found = [divergence(*(engine.logits(window) for engine in engines)).mean()
                         for window in self.yard.judging]  # fmt: skip
            finally:
                for engine in engines:
                    engine.close()
            return {"bar": KV_BARS[kv], **_figures(np.asarray([]), np.asarray(found))}

        for kv in KV_BARS:
            yield self.row("kv", scheme, lambda kv=kv: compute(kv), kv=kv)  # type: ignore[misc]

    def make(self, recipe: Recipe) -> tuple[Model, float]:
        """The compressed model, and the seconds it took."""
        began = time.monotonic()
        build = Build(calibration=self.yard.calibration, seed=recipe.seed, threads=self.yard.threads)
        return apply_recipe(load_any(self.yard.model), recipe, build), round(time.monotonic() - began, 1)


def _figures(choosing: Float64, judging: Float64) -> Row:
    """choosing_kl: of the windows that choose; windows: mean KL of each judging one; kl: of all of these."""
    return {"choosing_kl": float(choosing.mean()) if choosing.size else None, "kl": float(judging.mean()),
            "windows": [float(f"{value:.6g}") for value in judging]}  # fmt: skip


def measure(bench: Bench, options: argparse.Namespace) -> None:
    model = bench.yard.name
    peers = [bench.llama_cpp(kind) for kind in options.types.split(",") if kind] if bench.tools else []
    recipes = [recipe for word in options.ours for recipe in [read_word(word, model)] if recipe is not None]
    wanted = dict.fromkeys(row["ends"] for row in peers if row["name"] in BARS and "?" not in row["ends"])
    done = {bench.ours(recipe, recipe.name)["ends"] + _inside(recipe) for recipe in recipes}
    for recipe in (recipe for recipe in recipes if recipe.name not in PAIRS):
        for ends in wanted:
            if (case := ends + _inside(recipe)) not in done:
                bench.ours(with_ends(recipe, *ends.split("/")), f"{recipe.name} ends {ends}")
                done.add(case)
    if bench.tools:
        for word in options.exported:
            if (found := read_word(word, model)) is not None:
                bench.exported(found, LIKE, EXPORTED_BAR)
    for scheme in options.kv_of:
        list(bench.caches(scheme))
    if bench.tools and options.speed_rounds:
        own = [row for row in bench.rows if (row["yard"], row["model"]) == (bench.yard.key, model)]
        for bout in bouts_of(newest(own), BARS):
            if bout.what.startswith("same bytes") and bout.ours is not None:
                bench.speed(bout, options.llama_tools / "llama-bench", options.speed_rounds)


def _inside(recipe: Recipe) -> str:
    """What decides a recipe's bytes but for its ends."""
    return with_ends(recipe, "f32").hash


def newest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each case."""
    cases = ("yard", "model", "side", "name", "kv", "against")
    return list({tuple(row.get(key) for key in cases): row for row in rows}.values())


def report(rows: Sequence[Row], keys: Sequence[str]) -> str:
    kept = newest([row for row in rows if not keys or row["yard"] in keys])
    speeds = {(row["model"], row["name"], row["against"]): row for row in kept if row["side"] == "speed"}
    kept = [row for row in kept if row["side"] != "speed"]
    lines = [HEAD, *(bout.line(speeds) for bout in bouts_of(kept, BARS)), ""]
    lines += [*kv_lines([row for row in kept if row["side"] == "kv"]), ""]
    lines += ["| model | side | what | MB | KL | build s |", "|---|---|---|---:|---:|---:|"]
    order = sorted((row for row in kept if row["side"] != "kv"), key=lambda row: (row["model"], -row["bytes"]))
    lines += [f"| {row['model']} | {row['side']} | {row['name']} | {row['bytes'] / 1e6:.3f} | {row['kl']:.4e} "
              f"| {row.get('build_s', '')} |" for row in order]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    options = _parser().parse_args()
    rows: list[Row] = []
    if options.json is not None and options.json.exists():
        rows = [json.loads(line) for line in options.json.read_text(encoding="utf-8").splitlines()]
    keys = []
    if not options.only_report:
        options.work.mkdir(parents=True, exist_ok=True)
        tools = Tools(options.llama_tools, options.work, options.threads) if options.llama_tools else None
        calibrate, judge = read_text(options.calibrate, "none"), read_text(options.judge, options.prepare)
        for model in options.models:
            yard = make_yard(model, calibrate, judge, options.work, context=options.context,
                             windows=(options.windows, options.choosing, options.judging),
                             threads=options.threads)  # fmt: skip
            keys.append(yard.key)
            measure(Bench(yard, tools, options.work, options.json, rows, options.again), options)
    text = report(rows, keys)
    print(text)
    if options.table is not None:
        options.table.write_text(text + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--calibrate", type=Path, help="text for ours and for the importance matrix; .xz is unpacked")
    parser.add_argument("--judge", type=Path, help="another text, of the same kind")
    parser.add_argument("--prepare", choices=["none", "book"], default="none", help="of the judging text")
    parser.add_argument("--llama-tools", type=Path, default=None, help="folder of llama-quantize and llama-imatrix")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--ours", nargs="*", default=list(OURS), metavar="WORD",
                        help="schemes, METHOD:LAYERS/EMBEDDING+..., recipe files, MODEL=FILE")  # fmt: skip
    parser.add_argument("--exported", nargs="*", default=list(EXPORTED), metavar="WORD", help=f"exported as {LIKE}")
    parser.add_argument("--kv-of", nargs="*", default=["bf16"], metavar="SCHEME", help="measure KV caches with these")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=128, help="that calibrate")
    parser.add_argument("--choosing", type=int, default=16, help="windows that choose among ours at the same bytes")
    parser.add_argument("--judging", type=int, default=48, help="windows of the other text")
    parser.add_argument("--speed-rounds", type=int, default=0, help="decode of both sides too; needs llama-bench")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="files that are kept: 20 MB a window")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None)
    parser.add_argument("--again", nargs="*", default=[], metavar="WORD", help="compute anew what is called so")
    parser.add_argument("--only-report", action="store_true", help="tables of --json alone")
    return parser


if __name__ == "__main__":
    try:
        main()
    except TrilemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
