"""The machine's limits in a fresh process: read bandwidth over the model's bytes, and multiply-accumulates a second.

    python ceilings_worker.py '{"threads": 2, "bytes": 763000000, "program": "peak_rates", "model": ARTIFACT}'

`program` is peak_rates.cpp, compiled; None where that is not possible: then our kernels' own best rates, which are
lower than what the instructions could do, stand for the processor. `kernel_macs_per_s` is what the products of the
model alone reach: those of all layers for 512 tokens, one after the other, their inputs' rounding included. Prints one
JSON object on its last line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from layer_products import LayerProducts

from trilemma.measure.device.ceilings import read_bandwidth
from trilemma.measure.device.compute_ceiling import compute_rate

TOKENS, PASSES = 512, 5
PRODUCTS: dict[str, tuple[str, Any]] = {
    "int8_macs_per_s": ("int8-g128", "int8-g32"), "bf16_macs_per_s": ("bf16", "bf16"), "f32_macs_per_s": ("f32", "f32"),
}  # fmt: skip


def product_rate(path: str, threads: int) -> float:
    """Multiply-accumulates a second of the layers' products: the median of some walks over them, after a first."""
    products = LayerProducts(path, threads)
    walks = products.walk(TOKENS, PASSES)
    return TOKENS * products.macs_per_token / sorted(walks[1:])[(PASSES - 1) // 2]


def main() -> None:
    task = json.loads(sys.argv[1])
    threads = task["threads"]
    found: dict[str, float] = {}
    if task["program"]:
        words = [task["program"], str(threads), str(task["bytes"])]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    python = read_bandwidth(threads, task["bytes"]).bytes_per_s
    kernels = {name: compute_rate(*product, threads).macs_per_s for name, product in PRODUCTS.items()}
    print(json.dumps({
        "read_bytes_per_s": max(python, found.get("read_bytes_per_s", 0.0)),
        **{key: max(kernels[key], found.get(key, 0.0)) for key in PRODUCTS},
        "kernel_macs_per_s": product_rate(task["model"], threads), "instructions": sorted(found),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
