"""Decode of ours beside llama.cpp's file that it stands against: fresh processes, interleaved, the peer at its best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.cells import Cell, Group
from peers.engines_of import Files, Setup, llama_cpp, ours
from peers.ways import changes_of, default_of

TOKENS, REPEATS = 64, 5


def decode_rates(artifact: Path, gguf: Path, bench: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each round, the best of its repeats: {"ours": [...], "theirs": [...]}.

    In every round llama.cpp runs in its default set-up and with each change of one setting; its best counts.
    """
    cell = Cell("decode", TOKENS, repeats=REPEATS)
    setup, files, group = Setup(threads, llama_bench=str(bench)), Files(artifact, gguf, gguf, {}), Group("one", (cell,))
    default = default_of("llama.cpp", "")
    ways = [default, *(default | change for change in changes_of("llama.cpp", "", "16", cell))]
    found: dict[str, Any] = {"ours": [], "theirs": []}
    for turn in range(rounds):
        sides = ["ours", "theirs"] if turn % 2 else ["theirs", "ours"]
        for side in sides:
            runs = [ours(setup, files, "", group, {})] if side == "ours" else [
                llama_cpp(setup, files, "", group, way) for way in ways
            ]  # fmt: skip
            found[side].append(max(rate for run in runs for rate in run["rates"][0]))
    return found


__all__ = ["decode_rates"]
