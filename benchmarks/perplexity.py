"""Perplexity of the same GGUF file on the same text in llama.cpp and here, by llama.cpp's own protocol.

The model is stored in each format with embedding and head in it too, exported once, and that one file is read
by everybody: the native engine, llama.cpp behind the Engine protocol (the same arithmetic of quality on its
logits), and llama.cpp's own tool where --llama-perplexity names it. The text is one row of tokens in windows of
the context, BOS in front of each, second halves scored (`trilemma eval --protocol llama.cpp` does the same).

    python benchmarks/perplexity.py examples/models/hearth-7m --text examples/texts/children.txt \\
        --contexts 256,512 --llama-perplexity path/to/llama-perplexity --json out.jsonl

What is left of a difference is rounding: the caches (bf16 here, f16 there, unless --kv f32), the inputs of products
with bf16 weights (f32 here, bf16 there) and the int8 inputs of quantized ones, in groups of 32 in both.
Exit code 3 when a difference passes --bar.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trilemma.runtime.engine import EngineOptions

GGUF_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "int8-g32": "Q8_0", "int4-g32": "Q4_0",
              "int4-g32-asym": "Q4_1"}  # fmt: skip
TRIES = 5
END_OF_TEXT = "<|endoftext|>"


def store(source: Path, storage: str, path: Path) -> None:
    """The model with every matrix in one format, as a GGUF file."""
    from trilemma.core.recipe import Recipe, Step
    from trilemma.export.gguf import export_gguf
    from trilemma.formats.artifact import load_any
    from trilemma.techniques.apply import apply_recipe
    from trilemma.techniques.technique import Build

    if storage in ("f32", "f16", "bf16"):
        step = Step(technique="plain", settings={"dtype": storage})
    else:
        step = Step(technique="rtn", settings={"weights": storage, "embedding": storage, "head": storage})
    model = apply_recipe(load_any(source), Recipe(name=storage, steps=(step,)), Build())
    report = export_gguf(model, path)
    assert report.lossless, report.notes


def engine_perplexity(path: Path, text: Path, context: int, tokens: int, runtime: str, opened: EngineOptions) -> float:
    """By the project's own measuring code, on the logits of an engine."""
    from trilemma.measure.quality.evaluate import evaluate

    found = evaluate(
        path, text, context=context, max_tokens=tokens, protocol="llama.cpp", runtime=runtime, options=opened
    )
    value = found.rows[0].measurements["perplexity"].value
    assert value is not None
    return float(value)


def tool_perplexity(tool: str, path: Path, text: Path, context: int, tokens: int, opened: EngineOptions) -> float:
    """The final estimate that llama.cpp's own tool prints."""
    command = [tool, "-m", str(path), "-f", str(text), "-c", str(context), "-b", str(context), "-ub", str(context),
               "--chunks", str(tokens // context), "-t", str(opened.threads), "--no-warmup"]  # fmt: skip
    if opened.kv_cache == "f32":
        command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    for _ in range(TRIES):  # its log is written by a thread, and the last lines are lost now and then
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
        if said is not None:
            return float(said[1])
        if done.returncode:
            break
    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-1500:]}")


def compare(path: Path, text: Path, context: int, options: argparse.Namespace) -> dict[str, float]:
    """Perplexity by who measured it."""
    from trilemma.runtime.engine import EngineOptions

    tokens = options.tokens // context * context
    opened = EngineOptions(kv_cache=options.kv, threads=options.threads)
    found = {
        "native": engine_perplexity(path, text, context, tokens, "native", opened),
        "llama.cpp engine": engine_perplexity(path, text, context, tokens, "llama.cpp", opened),
    }
    if options.llama_perplexity:
        found["llama-perplexity"] = tool_perplexity(options.llama_perplexity, path, text, context, tokens, opened)
    return found


def differences(found: Mapping[str, float]) -> dict[str, float]:
    """How far the native engine is from each of the others, relative to theirs."""
    return {name: found["native"] / value - 1 for name, value in found.items() if name != "native"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--formats", default="f32,bf16,int8-g32,int4-g32")
    parser.add_argument("--contexts", default="256,512")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the text, from its beginning")
    parser.add_argument("--threads", type=int, default=1, help="figures do not depend on it")
    parser.add_argument("--kv", choices=["f32"], default=None, help="f32 on both sides; else each engine's own default")
    parser.add_argument("--llama-perplexity", default=None, help="path of llama.cpp's llama-perplexity")
    parser.add_argument("--bar", type=float, default=0.005, help="largest relative difference")
    parser.add_argument("--json", type=Path, default=None, help="append one line a case")
    options = parser.parse_args()
    print("| format | GGUF | context | tokens | native | llama.cpp engine | llama-perplexity | difference |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        raw = options.text.read_text(encoding="utf-8")
        text.write_text(raw.replace(END_OF_TEXT, "\n"), encoding="utf-8")
        for storage in options.formats.split(","):
            path = Path(scratch) / f"{storage}.gguf"
            store(options.model, storage, path)
            for context in (int(item) for item in options.contexts.split(",")):
                found = compare(path, text, context, options)
                apart = differences(found)
                worst = max(worst, *(abs(value) for value in apart.values()))
                tool = f"{found['llama-perplexity']:.4f}" if "llama-perplexity" in found else ""
                shown = ", ".join(f"{value:+.3%}" for value in apart.values())
                print(
                    f"| {storage} | {GGUF_TYPES[storage]} | {context} | {options.tokens // context * context} "
                    f"| {found['native']:.4f} | {found['llama.cpp engine']:.4f} | {tool} | {shown} |",
                    flush=True,
                )
                if options.json is not None:
                    line = {"model": options.model.name, "format": storage, "context": context, "kv": options.kv,
                            "text": options.text.name, "perplexity": found, "difference": apart}  # fmt: skip
                    with options.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
    print(f"largest difference {worst:.3%}, bar {options.bar:.1%}", file=sys.stderr)
    sys.exit(0 if worst <= options.bar else 3)


if __name__ == "__main__":
    main()
