"""How a model leaves for other runtimes. Each exporter is one file: a function from (model, path) to a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trilemma.core.record import Record
from trilemma.core.registry import Registry


class ExportReport(Record):
    """What an exporter wrote.

    tensor_bytes counts the tensors in the file, source_bytes what they take here; `types` maps a
    storage type of the target to how many tensors have it; `notes` says what is not bit for bit,
    what costs more bytes than here and what the target can not know.
    """

    path: str
    bytes: int
    tensor_bytes: int
    source_bytes: int
    types: dict[str, int]
    lossless: bool
    notes: tuple[str, ...] = ()


EXPORTERS: Registry[Callable[..., ExportReport]] = Registry(
    "exporter",
    {
        "gguf": "trilemma.export.gguf:export_gguf",
        "compressed-tensors": "trilemma.export.compressed_tensors:export_compressed_tensors",
    },
)

__all__: list[Any] = ["EXPORTERS", "ExportReport"]
