"""The longest context that each cache policy can hold within a memory limit, by the engine's own count."""

from __future__ import annotations

from trilemma.core.quantity import format_quantity
from trilemma.runtime.native import NativeEngine


def longest_context(engine: NativeEngine, limit_bytes: float) -> int:
    """The most positions whose weights, cache and scratch fit; 0 where not even one does.

    Args:
        engine: its KV policy is the one that is asked about.
        limit_bytes: for all that the engine holds.

    Room is asked for and counted, not computed: pages that nobody touches cost nothing.
    """

    def held(positions: int) -> int:
        return engine.open_sequences(1, max_context=positions).memory().total_bytes

    low, high = 0, engine.config.max_context
    if held(high) <= limit_bytes:
        return high
    while high - low > 1:  # low fits (or is 0), high does not
        middle = (low + high) // 2
        low, high = (middle, high) if held(middle) <= limit_bytes else (low, middle)
    return low


def memory_sentence(longest: dict[str, int], limit_bytes: float, most: int) -> str:
    """'within 15 MB: recompute holds 512 positions (all), cache bf16 300'."""
    words = []
    for policy, positions in longest.items():
        amount = "not even one position" if positions == 0 else f"{positions:,} positions"
        words.append(f"{policy} holds {amount}{' (all that the model takes)' if positions == most else ''}")
    return f"within {format_quantity(limit_bytes, 'bytes')}, weights included: {'; '.join(words)}"


__all__ = ["longest_context", "memory_sentence"]
