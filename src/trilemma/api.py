"""Public functions that join rooms and belong to none: what a command does in a line or two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trilemma.model.cost import Inspection
    from trilemma.model.model import Model


def inspect(model: Model | str | Path) -> Inspection:
    """What a model is and would cost, by arithmetic on its headers; no weight is read.

    Args:
        model: a checkpoint folder, an artifact folder, a bare config.json or a hub id.

    Raises:
        CheckpointError: nothing usable is there.
        UnsupportedModelError: an architecture that no family reads.
    """
    from trilemma.formats.artifact import load_any
    from trilemma.model.cost import inspect_model

    return inspect_model(load_any(model) if isinstance(model, str | Path) else model)


def export_model(model: Model | str | Path, output: str | Path, *, to: str = "gguf", force: bool = False) -> Path:
    """Write a model in another runtime's form; what lies on the same grid goes out bit for bit.

    Args:
        output: the file to write.
        to: a name of `trilemma list exporters`.
        force: replace a file that is there already.

    Raises:
        UnknownNameError: no such form.
        OutputError: the file exists, or can not be written.
    """
    from trilemma.core.errors import OutputError
    from trilemma.export import EXPORTERS
    from trilemma.formats.artifact import load_any

    exporter = EXPORTERS.get(to)
    path = Path(output)
    if path.exists() and not force:
        raise OutputError(f"'{path}' exists already. Give another path, or --force to replace it.")
    exporter(load_any(model) if isinstance(model, str | Path) else model, path)
    return path
