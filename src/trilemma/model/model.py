"""A model as techniques see it: a config, a lazy source of tensors, and what replaced some of them.

Nothing is read before it is asked for, and a changed model shares everything it did not change
with the model it came from, so the whole is never twice in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError
from trilemma.core.record import Record
from trilemma.model.config import DecoderConfig
from trilemma.model.located import Located

Float32 = NDArray[np.float32]
Activation = Literal["f32", "bf16", "int8-g32"]


@runtime_checkable
class StoredMatrix(Protocol):
    """A matrix held in some storage format (see `trilemma.formats`)."""

    @property
    def format(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...  # (out, in)

    @property
    def nbytes(self) -> int: ...

    def dequantize(self) -> Float32: ...


class TensorSource(Protocol):
    """Where unchanged tensors come from: a checkpoint folder, an artifact, random numbers."""

    def stored_dtype(self, name: str) -> str:
        """The format in which the source keeps it: 'f32', 'f16' or 'bf16' (or a packed format's name)."""
        ...

    def read(self, name: str) -> Float32 | StoredMatrix:
        """One tensor by canonical name: f32 values, or a packed matrix as stored."""
        ...


@runtime_checkable
class FileSource(Protocol):
    """A source whose matrices lie in files."""

    def locate(self, name: str) -> Located | None:
        """Where a matrix lies, or None for one that `read` has to make (parts of others, turned or shifted ones)."""
        ...


class LinearRun(Record):
    """How one matrix product is run: the precision of its input activations."""

    activation: Activation = "f32"


class RunSettings(Record):
    """Choices of a model that are no weights: the precision of the KV cache."""

    kv_cache: Literal["none", "f32", "bf16", "int8", "int4"] = "bf16"


class Model:
    """An immutable view: techniques return new models by `with_tensors` and friends.

    Args:
        config: what it is.
        source: where tensors that nobody replaced are read from.
        path: the folder it came from (tokenizer and template are found there), or None.
    """

    def __init__(
        self,
        config: DecoderConfig,
        source: TensorSource,
        *,
        path: Path | None = None,
        replaced: Mapping[str, Float32 | StoredMatrix] | None = None,
        linears: Mapping[str, LinearRun] | None = None,
        run: RunSettings | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.path = path
        self.replaced = dict(replaced or {})
        self.linears = dict(linears or {})
        self.run = run or RunSettings()

    def names(self) -> list[str]:
        return list(self.config.tensor_shapes())

    def stored(self, name: str) -> Float32 | StoredMatrix:
        """The tensor as it is kept: f32 values of an unquantized tensor, or a packed matrix."""
        if name in self.replaced:
            return self.replaced[name]
        return self.source.read(name)

    def locate(self, name: str) -> Located | None:
        """Where a matrix lies in a file, for who reads it from there; None where `stored` is the only way."""
        if name in self.replaced or not isinstance(self.source, FileSource):
            return None
        return self.source.locate(name)

    def tensor(self, name: str) -> Float32:
        """The tensor's values in f32, whatever it is stored in.

        Raises:
            CheckpointError: absent, or of another shape than the config says.
        """
        stored = self.stored(name)
        values = stored if isinstance(stored, np.ndarray) else stored.dequantize()
        expected = self.config.tensor_shapes().get(name)
        if expected is None or tuple(values.shape) != expected:
            raise CheckpointError(f"Tensor '{name}' has shape {tuple(values.shape)}; the config says {expected}.")
        return values

    def format_of(self, name: str) -> str:
        """The storage format's name; f32 arrays that a technique put in count as 'f32'."""
        if name in self.replaced:
            found = self.replaced[name]
            return "f32" if isinstance(found, np.ndarray) else found.format
        return self.source.stored_dtype(name)

    def linear(self, name: str) -> LinearRun:
        return self.linears.get(name, LinearRun())

    def with_tensors(
        self, tensors: Mapping[str, Float32 | StoredMatrix], linears: Mapping[str, LinearRun] | None = None
    ) -> Model:
        return self._copy(replaced={**self.replaced, **tensors}, linears={**self.linears, **(linears or {})})

    def with_source(self, source: TensorSource, names: Collection[str]) -> Model:
        """Tensors of these names are read from `source` when asked for, and no longer held."""
        held = {name: tensor for name, tensor in self.replaced.items() if name not in names}
        others = dict.fromkeys(names, source)
        if isinstance(self.source, _Patched):
            return self._copy(source=_Patched(self.source.base, {**self.source.others, **others}), replaced=held)
        return self._copy(source=_Patched(self.source, others), replaced=held)

    def with_run(self, run: RunSettings) -> Model:
        return self._copy(run=run)

    def with_config(self, config: DecoderConfig, rename: Callable[[str], str] | None = None) -> Model:
        """Another config over the same tensors; `rename` maps a new name to the old one (layer removal)."""
        if rename is None:
            return self._copy(config=config)
        old = {name: rename(name) for name in config.tensor_shapes()}
        return self._copy(
            config=config,
            source=_Renamed(self.source, rename),
            replaced={name: self.replaced[before] for name, before in old.items() if before in self.replaced},
            linears={name: self.linears[before] for name, before in old.items() if before in self.linears},
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _copy(
        self,
        *,
        config: DecoderConfig | None = None,
        source: TensorSource | None = None,
        replaced: Mapping[str, Float32 | StoredMatrix] | None = None,
        linears: Mapping[str, LinearRun] | None = None,
        run: RunSettings | None = None,
    ) -> Model:
        return Model(
            config or self.config,
            source or self.source,
            path=self.path,
            replaced=self.replaced if replaced is None else replaced,
            linears=self.linears if linears is None else linears,
            run=run or self.run,
        )


class _Renamed:
    def __init__(self, source: TensorSource, rename: Callable[[str], str]) -> None:
        self._source, self._rename = source, rename

    def stored_dtype(self, name: str) -> str:
        return self._source.stored_dtype(self._rename(name))

    def read(self, name: str) -> Float32 | StoredMatrix:
        return self._source.read(self._rename(name))

    def locate(self, name: str) -> Located | None:
        return self._source.locate(self._rename(name)) if isinstance(self._source, FileSource) else None


class _Patched:
    """A source of which some tensors are read elsewhere."""

    def __init__(self, base: TensorSource, others: Mapping[str, TensorSource]) -> None:
        self.base, self.others = base, others

    def stored_dtype(self, name: str) -> str:
        return self.others.get(name, self.base).stored_dtype(name)

    def read(self, name: str) -> Float32 | StoredMatrix:
        return self.others.get(name, self.base).read(name)

    def locate(self, name: str) -> Located | None:
        source = self.others.get(name, self.base)
        return source.locate(name) if isinstance(source, FileSource) else None
