"""A format for each tensor against one for all, and against bits alone where time is the limit.

    python benchmarks/allocation.py examples/models/hearth-7m --calibrate TEXT --judge OTHER --work out/allocation

At each number of bits: the uniform model (embedding and head in the same format) that loses least on the judging
windows among all formats that fit, against the mixture that `trilemma compress --bits` chooses, both guided, both
quantized on the same windows. Then time: with products timed on this host, the best mixture within what the smaller
mixtures take a token, against the best of those that were chosen by bits alone and take no longer. The choosing text
judges nothing. Ratios of mean KL are paired by window, with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from quality.yard import Yard, make_yard, read_text

from trilemma.core.errors import InputError, TrilemmaError
from trilemma.core.recipe import Recipe
from trilemma.formats.artifact import load_any
from trilemma.formats.artifact_record import weights_bytes
from trilemma.formats.pack import format_bytes
from trilemma.measure.stats import ratio_interval
from trilemma.model.checkpoint import model_hash
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import open_engine
from trilemma.search.mixed_bits import GENERATIONS, METHOD, Measured, MixedBits, time_levels
from trilemma.search.tensor_kit import default_levels, recipe_of
from trilemma.search.texts import read_texts
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.technique import Build

BAR = 0.75
UNIFORM = ("int2-g16-k", "int2-g32-asym", "int3-g32", "int3-g16-k", "int3-g32-asym", "int4-g128", "int4-g64-asym",
           "nl4-g32", "int4-g32")  # fmt: skip
GRID = tuple(3 + step / 4 for step in range(15))  # bits of the choices that know no time

Row = dict[str, Any]


class Rows:
    """Finished rows of a JSON lines file; the rest is computed."""

    def __init__(self, yard: Yard, model: Model, first: str | None, path: Path | None) -> None:
        self.yard, self.model, self.first, self.path = yard, model, first, path
        self.held: list[Row] = []
        if path is not None and path.exists():
            self.held = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def row(self, recipe: Recipe) -> Row:
        """KL by judging window and bytes of what a recipe makes on the calibration windows."""
        case = {"yard": self.yard.key, "model": self.yard.name, "first": self.first, "recipe": recipe.hash}
        for row in self.held:
            if all(row.get(key) == value for key, value in case.items()):
                return row
        made = apply_recipe(self.model, recipe, Build(self.yard.calibration, recipe.seed, self.yard.threads))
        _, windows = self.yard.divergences(open_engine(made, options=self.yard.options()))
        row = {**case, "name": recipe.name, "bytes": weights_bytes(made), "kl": float(windows.mean()),
               "windows": [float(f"{value:.6g}") for value in windows]}  # fmt: skip
        self.held.append(row)
        print(f"{recipe.name}: {row['bytes'] / 1e6:.3f} MB, KL {row['kl']:.3e}", file=sys.stderr, flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
        return row


def uniform(level: str) -> Recipe:
    return recipe_of({}, METHOD, f"{level} throughout", 0, weights=level)


def plain(found: MixedBits) -> Recipe:
    """Its recipe, to be calibrated on the windows of the yard like every other."""
    return found.recipe.model_copy(update={"calibration": None})


def by_bits(rows: Rows, measured: Measured, bits: list[float], generations: int) -> list[str]:
    """The best uniform model at each number of bits against the mixture."""
    lines = [
        "| bits | best uniform | KL | mixture | KL | ratio (95%) | at most | |",
        "|---:|---|---:|---|---:|---|---:|---|",
    ]
    for wanted in bits:
        alike = [rows.row(uniform(level)) for level in UNIFORM if _bits_of(rows.model, level) <= wanted]
        if not alike:
            raise InputError(f"No uniform format fits {wanted:g} bits. Give more to --bits.")
        best = min(alike, key=lambda row: row["kl"])
        found = measured.choose(wanted, generations=generations)
        mixed = rows.row(plain(found))
        lines.append(f"| {wanted:g} | {best['name']} | {best['kl']:.3e} | {found.bits:.2f} bits | {mixed['kl']:.3e} | "
                     f"{_against(mixed, best, BAR)} |")  # fmt: skip
    return lines


def by_time(rows: Rows, measured: Measured, bits: list[float], generations: int) -> list[str]:
    """The best mixture within a token's time against the best that bits alone choose within the same time."""
    blind = [measured.choose(size, generations=0) for size in GRID]
    lines = ["| ms a token, at most | by bits alone | ms | KL | under the time | ms | KL | ratio (95%) | at most | |",
             "|---:|---|---:|---:|---|---:|---:|---|---:|---|"]  # fmt: skip
    for wanted in bits:
        most = min(blind, key=lambda found: abs(found.bits - wanted)).tpot_s or 0.0
        within = min((found for found in blind if (found.tpot_s or 0.0) <= most), key=lambda found: found.kl_mean)
        timely = measured.choose(32.0, most, generations=generations)
        alone, mixed = rows.row(plain(within)), rows.row(plain(timely))
        lines.append(
            f"| {1e3 * most:.4f} | {within.bits:.2f} bits | {1e3 * (within.tpot_s or 0):.4f} | {alone['kl']:.3e} | "
            f"{timely.bits:.2f} bits | {1e3 * (timely.tpot_s or 0):.4f} | {mixed['kl']:.3e} | "
            f"{_against(mixed, alone, 1.0)} |"
        )
    return lines


def _bits_of(model: Model, level: str) -> float:
    shapes = [(shape[0], shape[1]) for shape in model.config.tensor_shapes().values() if len(shape) == 2]
    return 8 * sum(format_bytes(level, shape) for shape in shapes) / sum(rows * columns for rows, columns in shapes)


def _against(ours: Row, theirs: Row, bar: float) -> str:
    found = ratio_interval(ours["windows"], theirs["windows"], scale="log")
    low, high = found.ci95 or (float("nan"), float("nan"))
    verdict = "FAIL" if found.value > bar else "PASS" if high <= 1 else "INCONCLUSIVE"
    return f"{found.value:.3f} ({low:.3f} to {high:.3f}) | {bar:g} | {verdict}"


def main() -> None:
    options = _parser().parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    calibrate, judge = read_text(options.calibrate, "none"), read_text(options.judge, options.prepare)
    yard = make_yard(options.model, calibrate, judge, options.work, context=options.context,
                     windows=(options.windows, 16, options.judging), threads=options.threads)  # fmt: skip
    model = load_any(options.model)
    if options.first:
        model = apply_recipe(model, scheme_to_recipe(options.first), Build(yard.calibration, 0, options.threads))
    rows = Rows(yard, model, options.first, options.json)
    text = options.work / "calibrate.txt"  # of which mixtures keep a part back to choose by
    text.write_text(calibrate, encoding="utf-8")
    texts = read_texts([text], Tokenizer.load(options.model), options.context, 0, "none")
    levels, shared = default_levels(model.config), {"threads": options.threads, "progress": _tell}
    seconds = time_levels(model, levels, 4.0, **shared) if options.time_at else None
    measured = Measured(
        model, replace(texts, calibration=yard.calibration), folder=options.work / "reference", key=model_hash(model),
        levels=levels, seconds=seconds, **shared,
    )  # fmt: skip
    lines = by_bits(rows, measured, options.bits, options.generations)
    if options.time_at:
        lines += ["", *by_time(rows, measured, options.time_at, options.generations)]
    print("\n".join(lines))
    if options.table is not None:
        options.table.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tell(done: int, total: int, what: str) -> None:
    if done % 50 == 0:
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True, help="text to calibrate and to choose by; .xz too")
    parser.add_argument("--judge", type=Path, required=True, help="another text, of the same kind")
    parser.add_argument("--prepare", choices=["none", "book"], default="none", help="of the judging text")
    parser.add_argument("--first", metavar="SCHEME", help="done to the model before all of it, unquantized: smooth")
    parser.add_argument("--bits", nargs="*", type=float, default=[3.0, 3.5, 4.0, 4.5])
    parser.add_argument("--time-at", nargs="*", type=float, default=[3.5, 4.5], metavar="BITS",
                        help="also at the time that mixtures of so many bits take")  # fmt: skip
    parser.add_argument("--generations", type=int, default=GENERATIONS, help="of the evolution")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="that calibrate")
    parser.add_argument("--judging", type=int, default=24, help="windows of the other text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/allocation"))
    parser.add_argument("--json", type=Path, default=None, help="finished rows, which are not computed again")
    parser.add_argument("--table", type=Path, default=None)
    return parser


if __name__ == "__main__":
    try:
        main()
    except TrilemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
