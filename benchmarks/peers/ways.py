"""The set-ups of each peer that are tried before its best takes part: a default, and changes of one setting each.

Every change is tried alone; those that help are then tried together. That finds what a full product of the settings
would find as long as they do not depend on each other, in a fraction of the processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peers.cells import Cell

Way = dict[str, Any]
HELPS = 1.01  # a change counts from here on
WHOLE_ROW = 2**62  # OpenVINO's word for one activation scale a token


def default_of(engine: str, storage: str) -> Way:
    """What is tried first; ours has nothing to choose."""
    if engine == "llama.cpp":
        return {"flash": "on", "repack": 1, "load": "auto", "ubatch": 512}
    if engine == "openvino":
        return {"weights": weight_kinds(storage)[0], "hint": "f32", "dynamic": 32, "kv": ""}
    return {}


def changes_of(engine: str, storage: str, kv: str, cell: Cell) -> list[Way]:
    """One setting each. Deep caches take long to fill: only what concerns attention is tried there."""
    found: list[Way] = []
    if cell.kind == "open":
        return found
    deep, prefill = cell.setting == "deep", cell.kind == "prefill"
    if engine == "llama.cpp":
        if kv == "16":  # its attention over quantized values exists as flash attention alone
            found.append({"flash": "off"})
        if not deep:
            found += [{"repack": 0}, {"load": "none"}]
        if prefill:
            found += [{"ubatch": size} for size in (128, 256, 1024, 2048) if size <= max(512, cell.tokens)]
    if engine == "openvino":
        found.append({"hint": "bf16"})
        if not deep:
            found += [{"weights": kind} for kind in weight_kinds(storage)[1:]]
            found += [{"dynamic": group} for group in (128, WHOLE_ROW)]
        if kv == "16" and not prefill:
            found.append({"kv": "bf16"})
    return found


def fixed_by_cache(engine: str) -> Way:
    """What a way found with a 16-bit cache must say with a narrower one."""
    return {"llama.cpp": {"flash": "on"}, "openvino": {"kv": ""}}.get(engine, {})


def combined(default: Way, tried: Iterable[tuple[Way, float]], base: float) -> Way | None:
    """The default with every change that helped, one a setting; None where fewer than two did."""
    best: dict[str, tuple[float, Any]] = {}
    for change, rate in tried:
        for name, value in change.items():
            if rate > HELPS * base and rate > best.get(name, (0.0, None))[0]:
                best[name] = (rate, value)
    return None if len(best) < 2 else {**default, **{name: value for name, (_, value) in best.items()}}


def weight_kinds(storage: str) -> list[str]:
    """How OpenVINO may hold the codes of a format."""
    return ["i4", "u4"] if storage.startswith("int4") else ["i8", "u8"]


def words_of(way: Way) -> str:
    """A way as a reader wants it: 'flash on repack 1'."""
    shown = {name: "row" if value == WHOLE_ROW else value for name, value in way.items() if value != ""}
    return " ".join(f"{name} {value}" for name, value in shown.items())


__all__ = ["Way", "changes_of", "combined", "default_of", "fixed_by_cache", "weight_kinds", "words_of"]
