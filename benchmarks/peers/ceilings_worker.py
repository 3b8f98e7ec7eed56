"""The machine's limits in a fresh process: read bandwidth over the model's bytes, and multiply-accumulates a second.

    python ceilings_worker.py '{"threads": 2, "bytes": 763000000, "program": "peak_rates", "format": "int4-g32"}'

`program` is peak_rates.cpp, compiled; None where that is not possible: then our kernels' own best rates, which are
lower than what the instructions could do, stand for the processor. Prints one JSON object on its last line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from trilemma.measure.device.ceilings import read_bandwidth
from trilemma.measure.device.compute_ceiling import compute_rate

PRODUCTS: dict[str, tuple[str, Any]] = {
    "int8_macs_per_s": ("int8-g128", "int8-g32"), "bf16_macs_per_s": ("bf16", "bf16"), "f32_macs_per_s": ("f32", "f32"),
}  # fmt: skip


def main() -> None:
    task = json.loads(sys.argv[1])
    threads = task["threads"]
    found: dict[str, float] = {}
    if task["program"]:
        words = [task["program"], str(threads), str(task["bytes"])]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    python = read_bandwidth(threads, task["bytes"]).bytes_per_s
    kernels = {name: compute_rate(*product, threads).macs_per_s for name, product in PRODUCTS.items()}
    name = task["format"]
    plain = {"bf16": "bf16_macs_per_s", "f16": "f32_macs_per_s", "f32": "f32_macs_per_s"}.get(name)
    own = kernels[plain] if plain else compute_rate(name, "int8-g32", threads).macs_per_s
    print(json.dumps({
        "read_bytes_per_s": max(python, found.get("read_bytes_per_s", 0.0)),
        **{key: max(kernels[key], found.get(key, 0.0)) for key in PRODUCTS},
        "kernel_macs_per_s": own, "instructions": sorted(found),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
