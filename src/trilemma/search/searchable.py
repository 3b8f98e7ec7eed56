"""Which models can be searched: those with weights and a tokenizer, of which two fit in memory side by side."""

from __future__ import annotations

from pathlib import Path

from trilemma.core.environment import total_memory_bytes
from trilemma.core.errors import InputError
from trilemma.formats.artifact import load_any, weights_bytes
from trilemma.model.model import Model

_MEMORY_SHARE = 0.8  # of the machine, for baseline and candidate side by side


def load_searchable(model: Model | str | Path) -> Model:
    """Raises InputError for models that can not be searched: no weights, no folder, larger than memory."""
    loaded = model if isinstance(model, Model) else load_any(model)
    if getattr(loaded.source, "random", False):
        raise InputError(
            "This is a bare config.json: its weights are random, so there is no quality to keep. "
            "`trilemma bench` and `trilemma inspect` say what its shape costs."
        )
    if loaded.path is None:
        raise InputError("The model came from no folder, so it has no tokenizer. Save it, or give its folder.")
    needed, there = 2 * weights_bytes(loaded), total_memory_bytes()
    if there and needed > _MEMORY_SHARE * there:
        raise InputError(
            f"The unmodified model and a candidate need up to {needed / 1e9:.1f} GB side by side; this machine has "
            f"{there / 1e9:.1f} GB. Use a machine with more memory, or `trilemma compress` with a scheme."
        )
    return loaded
