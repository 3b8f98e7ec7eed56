"""How far default settings move a model, here and in llama.cpp: KL divergence of the same GGUF file in both engines.

llama.cpp's own tool quantizes the model to each type; that one file is read by the native engine and by llama.cpp, each
with the settings a user gets who asks for nothing (rounded inputs of products, KV cache). Both are held against the f32
logits of the unquantized model, token by token, on the same windows of a text that calibrated nothing.

    python benchmarks/kl_settings.py examples/models/hearth-7m out/hearth-spiky --text examples/texts/children.txt \\
        --llama-quantize path/to/llama-quantize --json kl_settings.jsonl

The ratio is paired by window, with a bootstrap interval over windows. Needs llama-cpp-python (here, or in the Python
that TRILEMMA_LLAMA_CPP names). Reference logits are held in memory: windows x context x vocabulary x 4 bytes.
Exit code 3 when a ratio passes --bar, and 4 when none does but an interval reaches beyond it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.core.recipe import Recipe, Step
from trilemma.data.documents import prepare_text
from trilemma.export.gguf import export_gguf
from trilemma.formats.artifact import load_any
from trilemma.measure.quality.texts import tokenizer_of
from trilemma.measure.stats import Interval, ratio_interval
from trilemma.runtime import open_engine
from trilemma.runtime.engine import Engine, EngineOptions
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.technique import Build

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0")
BAR = 1.1
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One model in one type: mean KL (nats a token) of both engines and the ratio of ours to llama.cpp's."""

    model: str
    kind: str
    bytes: int
    ours: float
    llama_cpp: float
    ratio: Interval

    def verdict(self, bar: float) -> str:
        if self.ratio.value > bar:
            return "not met"
        return "met" if self.ratio.high is not None and self.ratio.high <= bar else "met, interval beyond"

    def line(self, bar: float) -> str:
        low, high = self.ratio.ci95 or (float("nan"), float("nan"))
        return (
            f"| {self.model} | {self.kind} | {self.bytes / 1e6:.2f} | {self.ours:.4e} | {self.llama_cpp:.4e} "
            f"| {self.ratio.value:.4f} ({low:.4f} to {high:.4f}) | {self.verdict(bar)} |"
        )


def divergence(reference: Float32, logits: Float32) -> Float64:
    """KL(reference || other) of each position in nats, both (positions, vocab) logits."""
    p, q = _log_softmax(reference), _log_softmax(logits)
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def _log_softmax(logits: Float32) -> Float64:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def windows_of(model: Path, text: str, context: int, count: int) -> list[NDArray[np.int32]]:
    """Up to `count` windows of `context` tokens, spread evenly over the text."""
    tokens = np.asarray(tokenizer_of(load_any(model)).encode(text), np.int32)
    held = len(tokens) // context
    if held < 2:
        raise SystemExit(f"The text has {len(tokens)} tokens; windows of {context} need at least {2 * context}.")
    chosen = np.linspace(0, held - 1, min(count, held)).astype(int)
    return [tokens[at * context : (at + 1) * context] for at in chosen]


def logits_of(engine: Engine, windows: Sequence[NDArray[np.int32]]) -> Iterator[Float32]:
    """Logits window by window; the engine is closed at the end."""
    try:
        for window in windows:
            yield engine.logits(window)
    finally:
        engine.close()


def sums_of(engine: Engine, windows: Sequence[NDArray[np.int32]], reference: Sequence[Float32]) -> Float64:
    """Summed KL of each window."""
    found = logits_of(engine, windows)
    return np.asarray([divergence(exact, own).sum() for exact, own in zip(reference, found, strict=True)])


def compare(model: Path, kind: str, path: Path, windows: Sequence[NDArray[np.int32]], reference: Sequence[Float32],
            threads: int) -> Row:  # fmt: skip
    options = EngineOptions(threads=threads, max_context=len(windows[0]))  # nothing else: the defaults are the question
    sums = [
        sums_of(open_engine(path, runtime=runtime, options=options), windows, reference)
        for runtime in ("native", "llama.cpp")
    ]
    tokens = sum(map(len, windows))
    ours, theirs = (float(each.sum()) / tokens for each in sums)
    return Row(model.name, kind, path.stat().st_size, ours, theirs, ratio_interval(sums[0], sums[1]))


def rows_of(model: Path, options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    text = prepare_text(options.text.read_text(encoding="utf-8").replace("<|endoftext|>", "\n"), options.prepare)
    windows = windows_of(model, text, options.context, options.windows)
    exact = open_engine(model, runtime="torch", options=EngineOptions(threads=options.threads, kv_cache="f32"))
    reference = list(logits_of(exact, windows))
    wide = folder / "f32.gguf"
    plain = Recipe(name="f32", steps=(Step(technique="plain", settings={"dtype": "f32"}),))
    export_gguf(apply_recipe(load_any(model), plain, Build()), wide)
    for kind in options.types.split(","):
        path = folder / f"{kind}.gguf"
        quantize(options.llama_quantize, wide, path, kind, options.threads)
        yield compare(model, kind, path, windows, reference, options.threads)
        path.unlink()


def quantize(tool: str, source: Path, target: Path, kind: str, threads: int) -> None:
    """By llama.cpp's tool at its defaults, as a user would."""
    command = [tool, str(source), str(target), kind, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(done.stderr or done.stdout)[-1000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prepare", choices=["none", "book"], default="none", help="as `trilemma eval --prepare`")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="our figures do not depend on it")
    parser.add_argument("--llama-quantize", required=True, help="path of llama.cpp's llama-quantize")
    parser.add_argument("--bar", type=float, default=BAR, help="largest ratio of our KL to llama.cpp's")
    parser.add_argument("--json", type=Path, default=None, help="append one line a case")
    options = parser.parse_args()
    print(f"| model | type | MB | KL here | KL in llama.cpp | ratio (95%) | at most {options.bar:g} |")
    print("|---|---|---:|---:|---:|---|---|", flush=True)
    verdicts = []
    for model in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            for row in rows_of(model, options, Path(scratch)):
                print(row.line(options.bar), flush=True)
                verdicts.append(row.verdict(options.bar))
                if options.json is not None:
                    record = {"model": row.model, "type": row.kind, "bytes": row.bytes, "kl_ours": row.ours,
                              "kl_llama_cpp": row.llama_cpp, "ratio": row.ratio.value, "ratio_ci95": row.ratio.ci95,
                              "verdict": verdicts[-1], "windows": options.windows, "context": options.context,
                              "text": options.text.name}  # fmt: skip
                    with options.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
    sys.exit(3 if "not met" in verdicts else 4 if "met, interval beyond" in verdicts else 0)


if __name__ == "__main__":
    main()
