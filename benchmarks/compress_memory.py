"""Minutes and memory of `trilemma compress` on large models: random weights in the shapes of published ones.

    python benchmarks/compress_memory.py [--shape Llama-3.2-1B] [--scheme W4A8-g32-gptq] [--windows 128] [--layers 2]

Writes the checkpoint in bf16 (once, into `--work`), draws calibration windows of random tokens, compresses in a fresh
process and prints its minutes and its largest resident set beside the bound: 0.35 of the checkpoint's bytes + 1.5 GB.
With fewer `--layers` than the shape has, the bound is still that of the whole model: memory does not grow with depth.
Exits with 1 above the bound.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np

SHAPES = Path(__file__).resolve().parent.parent / "examples" / "shapes"
LLAMA_3B = {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}
CONTEXT = 512
SHARE, ROOM_BYTES = 0.35, 1.5e9


def main() -> int:
    options = read_options()
    options.work.mkdir(parents=True, exist_ok=True)
    layers, whole_bytes = make_checkpoint(options)
    output = options.work / f"{options.shape}-{options.scheme}"
    shutil.rmtree(output, ignore_errors=True)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=compress, args=(options, output, results))
    process.start()
    seconds, busy, peak_bytes = results.get()
    process.join()
    bound = SHARE * whole_bytes + ROOM_BYTES
    print(
        f"{options.shape}, {layers} layers, {options.scheme}, {options.windows} x {CONTEXT} tokens, "
        f"{options.threads or 'all'} threads: {seconds / 60:.1f} minutes ({busy / 60:.1f} of "
        f"processors), {peak_bytes / 1e9:.2f} GB resident at most, "
        f"bound {bound / 1e9:.2f} GB: {'PASS' if peak_bytes <= bound else 'FAIL'}"
    )
    return int(peak_bytes > bound)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Llama-3.2-1B", help="a folder of examples/shapes, or Llama-3.2-3B")
    parser.add_argument("--scheme", default="W4A8-g32-gptq")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--layers", type=int, help="keep so many layers of the shape")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("out") / "compress_memory")
    return parser.parse_args()


def make_checkpoint(options: argparse.Namespace) -> tuple[int, int]:
    """Layers, and bytes of all tensors of the whole shape in bf16."""
    from trilemma.model.checkpoint import read_checkpoint
    from trilemma.model.write import write_checkpoint

    three = options.shape == "Llama-3.2-3B"
    raw = json.loads((SHAPES / ("Llama-3.2-1B" if three else options.shape) / "config.json").read_text())
    raw |= LLAMA_3B if three else {}
    config = options.work / f"{options.shape}.json"
    config.write_text(json.dumps(raw))
    whole = 2 * sum(int(np.prod(shape)) for shape in read_checkpoint(config).config.tensor_shapes().values())
    raw["num_hidden_layers"] = options.layers or raw["num_hidden_layers"]
    config.write_text(json.dumps(raw))
    folder = checkpoint_folder(options)
    if not folder.is_dir():
        write_checkpoint(read_checkpoint(config), folder)
    return raw["num_hidden_layers"], whole


def checkpoint_folder(options: argparse.Namespace) -> Path:
    return Path(options.work) / f"{options.shape}-{options.layers or 'all'}"


def compress(
    options: argparse.Namespace, output: Path, results: multiprocessing.Queue[tuple[float, float, int]]
) -> None:
    import trilemma

    start = time.monotonic()

    def tell(done: int, total: int, what: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        passed = f"{time.monotonic() - start:8.1f} s {time.process_time():8.1f} s busy"
        print(f"{passed} {peak:5.2f} GB  {what}", file=sys.stderr, flush=True)

    tokens = np.random.default_rng(0).integers(0, 8192, (options.windows, CONTEXT)).astype(np.int32)
    trilemma.compress(
        checkpoint_folder(options), output, scheme=options.scheme, calibration=tokens, threads=options.threads,
        force=True, progress=tell,
    )  # fmt: skip
    results.put(
        (time.monotonic() - start, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    )


if __name__ == "__main__":
    sys.exit(main())
