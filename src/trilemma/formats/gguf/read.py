"""Opening a GGUF file as a Model: its structure and tokenizer from the metadata, its tensors when asked for.

Matrices of integer blocks run with 8-bit activations in groups of 32, as llama.cpp runs them; plain ones
with f32 activations, as checkpoints do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError
from trilemma.formats.gguf.blocks import rope_rows
from trilemma.formats.gguf.decode import decode_matrix, decode_vector, format_of, take_rows
from trilemma.model.config import DecoderConfig
from trilemma.model.gguf import GgufHeader, GgufTensor, gguf_config, gguf_name, gguf_types, read_gguf_header
from trilemma.model.gguf.names import rope_rows_needed
from trilemma.model.gguf.structure import ROPE_FACTORS, refuse_to_run, with_rope_factors
from trilemma.model.located import Located, Piece
from trilemma.model.model import Float32, LinearRun, Model, StoredMatrix

_FLOATING = ("F32", "F16", "BF16")


class GgufSource:
    """Reads tensors of a GGUF file on demand, each as it is stored."""

    random = False

    def __init__(self, path: Path, header: GgufHeader, config: DecoderConfig) -> None:
        self.path, self._header, self._config = path, header, config
        self._shapes = config.tensor_shapes()
        self.files = sorted({Path(tensor.file) for tensor in header.tensors.values()})
        self._sizes = {str(file): file_size(file) for file in self.files}

    def stored_dtype(self, name: str) -> str:
        return format_of(self._tensor(name).type, gguf_name(name))

    def read(self, name: str) -> Float32 | StoredMatrix:
        """One tensor by canonical name, q and k of 'llama' in the order of rows that rotate-half wants.

        Raises:
            CheckpointError: the file is cut, or has values that are not finite.
            UnsupportedModelError: a storage type that is not read.
        """
        tensor, stored_name, shape = self._tensor(name), gguf_name(name), self._shapes[name]
        raw = read_bytes(tensor, stored_name)
        rows = self._rows(name)
        if len(shape) == 1:
            values = decode_vector(raw, tensor.type, stored_name)
            return values if rows is None else values[rows]
        found = decode_matrix(raw, tensor.type, (shape[0], shape[1]), stored_name)
        return found if rows is None else take_rows(found, rows)

    def locate(self, name: str) -> Located | None:
        """Where a matrix lies, with the order of its rows that rotate-half wants."""
        tensor, shape, label = self._tensor(name), self._shapes[name], gguf_name(name)
        if len(shape) != 2:
            return None
        known, size = (shape[0], shape[1]), self._sizes[tensor.file]
        encoding = "rows" if tensor.type in _FLOATING else tensor.type
        pieces = {"values": Piece(tensor.offset, tensor.nbytes)}
        storage = format_of(tensor.type, label)
        return Located(encoding, storage, known, label, Path(tensor.file), size, pieces, self._rows(name))

    def _rows(self, name: str) -> NDArray[np.intp] | None:
        if not rope_rows_needed(self._header.architecture, name):
            return None
        spec = self._config.layers[int(name.split(".")[1])].attention
        assert spec is not None
        return np.argsort(rope_rows(spec.heads if name.split(".")[3] == "q" else spec.kv_heads, spec.head_dim))

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._shapes:
            raise CheckpointError(f"The GGUF file has no tensor '{name}'. It has {len(self._shapes)} others.")
        return self._header.tensors[gguf_name(name)]


def read_gguf(path: str | Path) -> Model:
    """Open a GGUF file; nothing but the header is read before a tensor is asked for.

    Raises:
        CheckpointError: damaged, cut, or metadata that contradict the tensors.
        UnsupportedModelError: an architecture, or a part of it, that is not run here.
    """
    place = Path(path)
    header = read_gguf_header(place)
    config = gguf_config(header)
    refuse_to_run(header, config)
    sizes = {file: file_size(Path(file)) for file in {tensor.file for tensor in header.tensors.values()}}
    for name, tensor in header.tensors.items():
        _check_place(tensor, name, sizes[tensor.file])
    if ROPE_FACTORS in header.tensors:
        factors = header.tensors[ROPE_FACTORS]
        config = with_rope_factors(config, decode_vector(read_bytes(factors, ROPE_FACTORS), factors.type, ROPE_FACTORS))
    types = gguf_types(header, config)
    linears = {
        name: LinearRun(activation="int8-g32") for name in config.product_names() if types[name] not in _FLOATING
    }
    return Model(config, GgufSource(place, header, config), path=place, linears=linears)


def read_bytes(tensor: GgufTensor, name: str) -> NDArray[np.uint8]:
    """The bytes of a tensor. Raises CheckpointError where the file ends before them."""
    try:
        with Path(tensor.file).open("rb") as file:
            file.seek(tensor.offset)
            raw = np.fromfile(file, dtype=np.uint8, count=tensor.nbytes)
    except OSError as error:
        raise CheckpointError(f"Can not read '{tensor.file}': {error.strerror or error}.") from None
    if raw.nbytes != tensor.nbytes:
        raise CheckpointError(f"'{tensor.file}' ends inside tensor '{name}': it is cut. Fetch it again.")
    return raw


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"Can not read '{path}': {error.strerror or error}.") from None


def _check_place(tensor: GgufTensor, name: str, size: int) -> None:
    if tensor.offset + tensor.nbytes > size:
        raise CheckpointError(
            f"'{tensor.file}' has {size} bytes, and tensor '{name}' would end at {tensor.offset + tensor.nbytes}: "
            "the file is damaged or cut. Fetch it again."
        )
