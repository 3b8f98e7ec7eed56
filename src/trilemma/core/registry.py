"""One generic table: name -> "module:attribute", loaded on first use.

No folder is scanned and importing a table imports nothing heavy. Other packages add entries
through entry points of the group `trilemma.<kind>`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from types import ModuleType
from typing import Generic, TypeVar, cast

from trilemma.core.errors import MissingExtraError, UnknownNameError

T = TypeVar("T")

_EXTRA_OF = {"torch": "compress", "gguf": "gguf", "huggingface_hub": "hub", "pynvml": "nvml", "llama_cpp": "llama-cpp"}


class Registry(Generic[T]):
    """A lazily loaded table of named things.

    Args:
        kind: what an entry is, in words ("technique"); entry points come from `trilemma.<kind>`.
        entries: name -> "module:attribute".
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._targets = dict(entries)
        self._loaded: dict[str, T] = {}
        self._merged = False

    def register(self, name: str, target: str) -> None:
        """Add an entry. Raises ValueError when the name is taken by another target."""
        if self._targets.get(name, target) != target:
            raise ValueError(f"{self.kind} '{name}' is already registered as {self._targets[name]}")
        self._targets[name] = target

    def names(self) -> list[str]:
        self._merge_entry_points()
        return sorted(self._targets)

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            UnknownNameError: no such entry; the message names the valid ones.
            MissingExtraError: it needs a package of an extra that is not installed.
        """
        self._merge_entry_points()
        if name not in self._targets:
            raise UnknownNameError(self.kind, name, self._targets)
        if name not in self._loaded:
            module, _, attribute = self._targets[name].partition(":")
            self._loaded[name] = cast(T, getattr(self._import(name, module), attribute))
        return self._loaded[name]

    def _import(self, name: str, module: str) -> ModuleType:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _EXTRA_OF:
                raise
            raise MissingExtraError(package, _EXTRA_OF[package], f"The {self.kind} '{name}'") from None

    def __contains__(self, name: object) -> bool:
        self._merge_entry_points()
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _merge_entry_points(self) -> None:
        if self._merged:
            return
        self._merged = True
        for point in entry_points(group=f"trilemma.{self.kind}"):
            self.register(point.name, point.value)
