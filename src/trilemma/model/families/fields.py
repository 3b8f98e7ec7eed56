"""Typed reading of config.json: each getter returns a checked value or names the key, the value and the fix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trilemma.core.errors import CheckpointError, UnsupportedModelError

Raw = Mapping[str, Any]
# Sizes are believed before any weight is seen, so that those that no model has must not cost memory.
_MOST = {"layer": 1 << 12, "position": (1 << 31) - 1, "window": (1 << 31) - 1}
_MOST_OTHERS = 1 << 24


def positive_int(raw: Raw, key: str, default: int | None = None) -> int:
    """A required positive integer, or `default` where the key is absent or null."""
    value = raw.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"config.json lacks '{key}'. Copy the config.json of the original model.")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"config.json: '{key}' is {_short(value)}; expected a positive integer.")
    most = next((bound for part, bound in _MOST.items() if part in key), _MOST_OTHERS)
    if value > most:
        raise CheckpointError(f"config.json: '{key}' is {_short(value)}; at most {most} is possible. Fetch it again.")
    return value


def optional_int(raw: Raw, key: str) -> int | None:
    """A positive integer, or None where the key is absent or null."""
    return None if raw.get(key) is None else positive_int(raw, key)


def positive_float(raw: Raw, key: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"config.json lacks '{key}'. Copy the config.json of the original model.")
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"config.json: '{key}' is {value!r}; expected a positive number.")
    return float(value)


def flag(raw: Raw, key: str, default: bool) -> bool:
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: '{key}' is {value!r}; expected true or false.")
    return value


def token_id(raw: Raw, key: str, vocab_size: int) -> int | None:
    """One token id; None where absent. Ids outside the vocabulary can never occur and count as absent."""
    found = token_ids(raw, key, vocab_size)
    return found[0] if found else None


def token_ids(raw: Raw, key: str, vocab_size: int) -> tuple[int, ...]:
    """One id or a list of ids, those of the vocabulary only."""
    value = raw.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
        raise CheckpointError(f"config.json: '{key}' is {value!r}; expected a token id or a list of token ids.")
    return tuple(item for item in ids if 0 <= item < vocab_size)


def refuse_unless(raw: Raw, key: str, valid: Sequence[Any]) -> None:
    """Raise UnsupportedModelError where the key is present, not null, and none of the `valid` values."""
    value = raw.get(key)
    if value is not None and value not in valid:
        listed = ", ".join(repr(item) for item in valid) or "none (the key must be absent or null)"
        raise UnsupportedModelError(f"config.json: '{key}' is {_short(value)}, not supported here. Valid: {listed}.")


def refuse_quantized(raw: Raw) -> None:
    """Raise UnsupportedModelError for a checkpoint that is quantized already."""
    found = raw.get("quantization_config")
    if found is not None:
        method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
        raise UnsupportedModelError(
            f"config.json: 'quantization_config' is present (quant_method {method!r}): this checkpoint is quantized "
            "already. Start from the unquantized original (bf16, f16 or f32), named in its model card."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
