"""Weights alone: our quantizers beside AutoRound, GPTQModel and llm-compressor, same grid, same calibration windows.

    python benchmarks/weights_alone.py examples/models/hearth-7m --calibrate TEXT --judge OTHER \\
        --auto-round-python PYTHON --gptqmodel-python PYTHON --llm-compressor-python PYTHON \\
        --work out/weights --json weights.jsonl --table weights.md

Symmetric codes in groups, embedding and head untouched, inputs not rounded. Each side's matrices are turned back into
f32 and run by the same engine in f32, so that nothing but the weights differs; KL is against the unquantized model on
windows of a text that calibrated nothing. Peers run at their own defaults but for bits and group (a set-up such as
`auto-round:iters=0` is one more contender), each time in a fresh process; their time is that of quantizing an opened
model. `@64` behind one of ours calibrates with that many of the same windows. Rounds go over all contenders in turn,
and the least time of each counts.

Each peer needs a Python of its own with its package (or TRILEMMA_AUTO_ROUND_PYTHON, TRILEMMA_GPTQMODEL_PYTHON,
TRILEMMA_LLM_COMPRESSOR_PYTHON); those without one are left out. A run with the same --json goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers.engines_of import EngineFailedError, run_worker
from peers.quantizer_worker import Clock
from quality.recipes import read_word
from quality.yard import Yard, make_yard, read_text

from trilemma.core.errors import InputError, TrilemmaError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats.artifact import load_any
from trilemma.measure.stats import ratio_interval
from trilemma.model.model import Model
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.technique import Build

Row = dict[str, Any]
PEERS = ("auto-round", "gptqmodel", "llm-compressor")
OURS = ("gptq", "gptq@64", "guided", "sign", "gptq+scales100", "guided+scales100")
CASES = ("4-128", "4-32", "3-128")
KL_BAR, TIME_BAR = 1.0, 0.5
PLAIN = Recipe(name="f32", steps=(Step(technique="plain", settings={"dtype": "f32", "activations": "f32"}),))


def judged(yard: Yard, model: Model) -> list[float]:
    """Mean KL of each judging window; matrices as they stand, everything else in f32."""
    options = EngineOptions(threads=yard.threads, max_context=yard.context, kv_cache="f32")
    engine = open_engine(apply_recipe(model, PLAIN, Build()), options=options)
    return [float(f"{value:.6g}") for value in yard.divergences(engine)[1]]


def run_ours(yard: Yard, word: str, bits: int, group: int) -> Row:
    word, _, count = word.partition("@")
    method, plus, behind = word.partition("+")
    recipe = read_word(f"{method}:int{bits}-g{group}/bf16{plus}{behind}", yard.name)
    assert recipe is not None
    first, *others = recipe.steps
    weights_only = first.model_copy(update={"settings": first.settings | {"activations": "bf16"}})
    recipe = recipe.model_copy(update={"steps": (weights_only, *others)})
    loaded, windows = load_any(yard.model), yard.calibration
    if count:  # fewer of the same windows, spread evenly
        windows = windows[np.linspace(0, len(windows) - 1, min(int(count), len(windows))).astype(int)]
    clock = Clock()
    made = apply_recipe(loaded, recipe, Build(calibration=windows, threads=yard.threads))
    return {**vars(clock.stop()), "windows": judged(yard, made)}


def run_peer(yard: Yard, word: str, bits: int, group: int, python: str, work: Path) -> Row:
    peer, _, more = word.partition(":")
    windows, output = work / f"calibration-{yard.key}.npy", work / f"{yard.name}-{peer}"
    np.save(windows, yard.calibration)
    shutil.rmtree(output, ignore_errors=True)
    paths = {"model": yard.model, "windows": windows, "output": output}
    task = {"peer": peer, "bits": bits, "group": group, "threads": yard.threads, "more": settings_of(more),
            **{name: str(path.resolve()) for name, path in paths.items()}}  # fmt: skip
    found = run_worker(python, "quantizer", task)
    wanted = sum(name.startswith("layers.") and len(shape) == 2
                 for name, shape in load_any(yard.model).config.tensor_shapes().items())  # fmt: skip
    if found["matrices"] != wanted:
        raise EngineFailedError(f"{word} quantized {found['matrices']} matrices of {wanted}")
    return found | {"windows": judged(yard, load_any(output))}


def settings_of(text: str) -> dict[str, Any]:
    """'iters=0,batch_size=1' -> {'iters': 0, 'batch_size': 1}; values are JSON."""
    return {name: json.loads(value) for name, _, value in (item.partition("=") for item in text.split(",") if item)}


def measure(yard: Yard, options: argparse.Namespace, rows: list[Row]) -> None:
    pythons = {peer: vars(options)[f"{peer.replace('-', '_')}_python"] for peer in PEERS}
    contenders = [word for word in options.peers if pythons.get(word.partition(":")[0])] + options.ours
    cases = [tuple(map(int, case.split("-"))) for case in options.cases]
    for turn in range(options.rounds):
        for bits, group in cases:
            for word in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
                about = {"yard": yard.key, "model": yard.name, "bits": bits, "group": group, "who": word,
                         "threads": yard.threads, "round": turn}  # fmt: skip
                if any(all(row.get(key) == value for key, value in about.items()) for row in rows):
                    continue
                try:
                    if word in options.ours:
                        found = {"side": "ours", **run_ours(yard, word, bits, group)}
                    else:
                        python = pythons[word.partition(":")[0]]
                        found = {"side": "peer", **run_peer(yard, word, bits, group, python, options.work)}
                except EngineFailedError as error:
                    found = {"side": "failed", "reason": str(error)}
                _write(about | found | {"at": time.time()}, rows, options.json)


def _write(row: Row, rows: list[Row], path: Path | None) -> None:
    rows.append(row)
    kl = f"KL {np.mean(row['windows']):.4e}, {row['seconds']:.1f} s" if "windows" in row else row["reason"][-300:]
    print(f"{row['model']} W{row['bits']} g{row['group']} {row['who']}: {kl}", file=sys.stderr, flush=True)
    if path is not None:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


def report(rows: Sequence[Row]) -> str:
    """Every contender, then every one of ours against every peer."""
    runs: dict[tuple[str, int, int, str, str], list[Row]] = {}
    for row in (row for row in rows if row["side"] != "failed"):
        key = (row["model"], row["bits"], row["group"], row["side"], row["who"])
        runs.setdefault(key, []).append(row)
    lines = ["| model | grid | who | KL | least s | of the processor | runs |", "|---|---|---|---:|---:|---:|---:|"]
    for (model, bits, group, _, who), found in sorted(runs.items()):
        kl = np.mean(found[-1]["windows"])
        times = f"{_least(found):.1f} | {_least(found, 'cpu_seconds'):.1f}"
        lines.append(f"| {model} | W{bits} g{group} | {who} | {kl:.4e} | {times} | {len(found)} |")
    lines += ["", "| model | grid | ours | peer | KL ratio (95%) | time ratio | of the processor's | verdict |"]
    lines.append("|---|---|---|---|---|---:|---:|---|")
    for (*place, side, who), found in sorted(runs.items()):
        for (*other_place, other_side, peer), theirs in sorted(runs.items()):
            if side == "ours" and other_side == "peer" and place == other_place:
                case = f"{place[0]} | W{place[1]} g{place[2]}"
                lines.append(f"| {case} | {who} | {peer} | {_compared(found, theirs)} |")
    failed = {(row["who"], row["bits"], row["group"]): row["reason"] for row in rows if row["side"] == "failed"}
    versions = {str(row["versions"]) for row in rows if "versions" in row}
    lines += ["", *(f"failed: {who} W{bits} g{group}: {why[-300:]}" for (who, bits, group), why in failed.items())]
    return "\n".join([*lines, *sorted(versions)])


def _compared(ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    ratio = ratio_interval(ours[-1]["windows"], theirs[-1]["windows"], scale="log")
    low, high = ratio.ci95 or (float("nan"), float("nan"))
    pace, cpu = (_least(ours, kind) / _least(theirs, kind) for kind in ("seconds", "cpu_seconds"))
    return f"{ratio.value:.3f} ({low:.3f} to {high:.3f}) | {pace:.2f} | {cpu:.2f} | {verdict(ratio.value, high, pace)}"


def _least(rows: Sequence[Row], kind: str = "seconds") -> float:
    return min(float(row[kind]) for row in rows)


def verdict(ratio: float, high: float, pace: float) -> str:
    """Both bars: no more KL, in half the time."""
    if ratio > KL_BAR or pace > TIME_BAR:
        return "FAIL: " + " and ".join(["KL"] * (ratio > KL_BAR) + ["time"] * (pace > TIME_BAR))
    return "PASS" if high <= KL_BAR else "INCONCLUSIVE"


def main() -> None:
    options = _parser().parse_args()
    rows: list[Row] = []
    if options.json is not None and options.json.exists():
        rows = [json.loads(line) for line in options.json.read_text(encoding="utf-8").splitlines()]
    if not options.only_report:
        if not (options.calibrate and options.judge):
            raise InputError("Give a text with --calibrate and another one with --judge.")
        options.work.mkdir(parents=True, exist_ok=True)
        texts = read_text(options.calibrate, "none"), read_text(options.judge, options.prepare)
        for model in options.models:
            yard = make_yard(model, *texts, options.work, context=options.context,
                             windows=(options.windows, 0, options.judging), threads=options.threads)  # fmt: skip
            measure(yard, options, rows)
    text = report(rows)
    print(text)
    if options.table is not None:
        options.table.write_text(text + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="llama-like checkpoints that transformers reads too")
    parser.add_argument("--calibrate", type=Path, help="text; .xz is unpacked")
    parser.add_argument("--judge", type=Path, help="another text, of the same kind")
    parser.add_argument("--prepare", choices=["none", "book"], default="none", help="of the judging text")
    for peer in PEERS:
        name = f"TRILEMMA_{peer.replace('-', '_').upper()}_PYTHON"
        parser.add_argument(f"--{peer}-python", default=os.environ.get(name), help=f"by default ${name}")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), metavar="PEER[:SETTING=VALUE,...]")
    parser.add_argument("--ours", nargs="*", default=list(OURS), metavar="METHOD[+PART][@WINDOWS]")
    parser.add_argument("--cases", nargs="*", default=list(CASES), metavar="BITS-GROUP")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=128, help="that calibrate")
    parser.add_argument("--judging", type=int, default=48, help="windows of the other text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/weights"))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None)
    parser.add_argument("--only-report", action="store_true", help="tables of --json alone")
    return parser


if __name__ == "__main__":
    try:
        main()
    except TrilemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
