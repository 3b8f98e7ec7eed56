"""Predictions for other devices beside what others published: the table of docs/concepts/devices.md.

    python benchmarks/devices.py

Nothing is run on a device: the published numbers stand with their sources in `trilemma/devices/published.yaml`.
Cases marked 'fit' set a number of the device's profile, those marked 'check' did not.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml

from trilemma.core.device import load_device
from trilemma.core.quantity import significant
from trilemma.measure.device.device_model import decode_seconds, joules

PROMPT_TOKENS = {"phone": 64, "raspberry-pi-5": 512}  # as the sources state
HEADERS = ("device", "model", "used to", "decode tokens/s", "prefill tokens/s", "J a token, decode")


def compare(case: dict[str, Any]) -> list[str]:
    """One row: predicted, published and their ratio for each figure that was published."""
    device = load_device(case["device"])
    read, macs = float(case["read_bytes"]), {case["precision"]: float(case["macs"])}
    seconds, _ = decode_seconds(device, read, macs)
    cells = [_cell(1 / seconds, case["decode_tokens_per_s"]), "", ""]
    if "prefill_macs" in case:
        tokens = PROMPT_TOKENS[case["device"]]
        whole, _ = decode_seconds(device, read, {case["precision"]: tokens * float(case["prefill_macs"])})
        cells[1] = _cell(tokens / whole, case["prefill_tokens_per_s"])
    if "j_per_token" in case:
        cells[2] = _cell(joules(device, seconds=seconds, read_bytes=read, macs=macs), case["j_per_token"])
    return [case["device"], case["model"], case["use"], *cells]


def _cell(predicted: float, published: object) -> str:
    known = float(str(published))
    return f"{significant(predicted)} / {significant(known)} = {predicted / known:.2f}"


def main() -> None:
    cases = yaml.safe_load((files("trilemma") / "devices" / "published.yaml").read_text(encoding="utf-8"))["cases"]
    rows = [list(HEADERS), ["---"] * len(HEADERS), *(compare(case) for case in cases)]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
