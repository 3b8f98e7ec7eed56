"""Side by side with llama.cpp: the same weights and bits, the same threads, interleaved rounds.

Each round starts every engine in a fresh process, one after the other, so that a drifting machine
hits all of them; medians over rounds and their ratio are printed, one JSON line a result is
appended to --json. llama.cpp runs either through its own `llama-bench` (give --llama-bench, the
fair way for small models) or through the C interface of the package llama-cpp-python.

    python benchmarks/engines.py examples/models/hearth-7m examples/shapes/SmolLM2-135M --rounds 5

Leaves out other peers and long contexts for now.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

GGUF_TYPES = {"bf16": "BF16", "int8-g32": "Q8_0", "int4-g32": "Q4_0"}


def build(source: Path, storage: str, folder: Path) -> tuple[Path, Path]:
    """An artifact and the very same weights as GGUF. Embedding and head are stored like the rest."""
    from trilemma.core.recipe import Recipe, Step
    from trilemma.export.gguf import export_gguf
    from trilemma.formats.artifact import load_any, write_artifact
    from trilemma.techniques.apply import apply_recipe
    from trilemma.techniques.technique import Build

    artifact, gguf = folder / f"{source.name}-{storage}", folder / f"{source.name}-{storage}.gguf"
    model = load_any(source)
    if storage == "bf16":
        recipe = Recipe(name=storage, steps=(Step(technique="plain", settings={"dtype": "bf16"}),))
    else:
        settings = {"weights": storage, "embedding": storage, "head": storage, "scale": "absmax"}
        recipe = Recipe(name=storage, steps=(Step(technique="rtn", settings=settings),))
    built = apply_recipe(model, recipe, Build())
    write_artifact(built, artifact, recipe)
    export_gguf(load_any(artifact), gguf)
    return artifact, gguf


def ours(artifact: Path, prompt: int, output: int, threads: int) -> dict[str, float]:
    """One fresh process of our engine."""
    return _worker("ours", artifact, prompt, output, threads)


def llama_cpp(gguf: Path, prompt: int, output: int, threads: int, bench: str | None) -> dict[str, float]:
    """One fresh process of llama.cpp: flash attention on, KV cache in f16 (its defaults otherwise)."""
    if bench is None:
        return _worker("llama_cpp", gguf, prompt, output, threads)
    lengths = ["-p", str(prompt), "-n", str(output)]
    command = [bench, "-m", str(gguf), *lengths, "-t", str(threads), "-r", "2", "-o", "json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    rate = {"prefill" if row["n_prompt"] else "decode": row["avg_ts"] for row in rows}
    return {"prefill_tokens_per_s": rate["prefill"], "decode_tokens_per_s": rate["decode"]}


def _worker(kind: str, path: Path, prompt: int, output: int, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", kind, str(path), "--prompt", str(prompt),
               "--output", str(output), "--threads", str(threads)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed on {path}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def worker_ours(path: str, prompt: int, output: int, threads: int) -> dict[str, float]:
    import time

    import numpy as np

    from trilemma.runtime import EngineOptions, SamplingSettings, open_engine

    engine = open_engine(path, options=EngineOptions(threads=threads, max_context=max(prompt, output) + 8))
    tokens = np.random.default_rng(0).integers(3, engine.config.vocab_size, prompt).astype(np.int32)
    engine.logits(tokens, last_only=True)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        engine.logits(tokens, last_only=True)
        seconds.append(time.perf_counter() - started)
    settings = SamplingSettings(max_tokens=output, ignore_eos=True)
    engine.generate(tokens[:1].tolist(), settings)
    gaps = []
    for _ in range(2):
        times = engine.generate(tokens[:1].tolist(), settings).token_times_s
        gaps.append((times[-1] - times[0]) / (len(times) - 1))
    return {
        "prefill_tokens_per_s": prompt / statistics.mean(seconds),
        "decode_tokens_per_s": 1 / statistics.mean(gaps),
    }


def worker_llama_cpp(path: str, prompt: int, output: int, threads: int) -> dict[str, float]:
    import time

    import llama_cpp as lib
    import numpy as np

    llm = lib.Llama(path, n_ctx=prompt + output + 8, n_batch=prompt, n_ubatch=prompt, n_threads=threads,
                    n_threads_batch=threads, verbose=False, flash_attn=True)  # fmt: skip
    tokens = np.random.default_rng(0).integers(3, llm.n_vocab(), prompt).tolist()
    llm.eval(tokens)
    seconds = []
    for _ in range(2):
        llm.reset()
        started = time.perf_counter()
        llm.eval(tokens)
        seconds.append(time.perf_counter() - started)
    llm.reset()
    llm.eval(tokens[:1])
    started = time.perf_counter()
    for token in tokens[:output]:
        llm.eval([token])
    return {
        "prefill_tokens_per_s": prompt / statistics.mean(seconds),
        "decode_tokens_per_s": output / (time.perf_counter() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--formats", default="bf16,int8-g32,int4-g32")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-bench", default=None, help="path of llama.cpp's llama-bench")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", choices=["ours", "llama_cpp"], default=None)
    options = parser.parse_args()
    if options.worker:
        work = worker_ours if options.worker == "ours" else worker_llama_cpp
        print(json.dumps(work(str(options.models[0]), options.prompt, options.output, options.threads)))
        return
    print("| model | format | bytes | metric | ours | llama.cpp | ratio (min..max) |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for source in options.models:
            for storage in options.formats.split(","):
                compare(source, storage, Path(scratch), options)


def compare(source: Path, storage: str, scratch: Path, options: argparse.Namespace) -> None:
    artifact, gguf = build(source, storage, scratch)
    prompt = min(options.prompt, 500 if source.name.startswith("hearth") else options.prompt)
    rounds = [
        (
            ours(artifact, prompt, options.output, options.threads),
            llama_cpp(gguf, prompt, options.output, options.threads, options.llama_bench),
        )
        for _ in range(options.rounds)
    ]
    for metric in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        mine, theirs = [a[metric] for a, _ in rounds], [b[metric] for _, b in rounds]
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        row = {
            "model": source.name, "format": storage, "gguf_type": GGUF_TYPES[storage], "bytes": gguf.stat().st_size,
            "metric": metric, "prompt_tokens": prompt, "output_tokens": options.output, "threads": options.threads,
            "ours": mine, "llama_cpp": theirs, "ratio_median": statistics.median(ratios),
        }  # fmt: skip
        print(
            f"| {source.name} | {storage} | {row['bytes'] / 1e6:.1f} MB | {metric} | {statistics.median(mine):.0f} "
            f"| {statistics.median(theirs):.0f} | {row['ratio_median']:.2f} ({min(ratios):.2f}..{max(ratios):.2f}) |",
            flush=True,
        )
        if options.json:
            with options.json.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
    gguf.unlink()


if __name__ == "__main__":
    main()
