"""GGUF files as descriptions of a model: header, structure and tokenizer. Weights are `formats/gguf`'s matter."""

from __future__ import annotations

from trilemma.model.gguf.header import GgufHeader, GgufTensor, find_gguf, read_gguf_arrays, read_gguf_header
from trilemma.model.gguf.names import gguf_name
from trilemma.model.gguf.structure import ARCHITECTURES, gguf_config, gguf_types
from trilemma.model.gguf.types import GGML_TYPES, type_bits

__all__ = [
    "ARCHITECTURES",
    "GGML_TYPES",
    "GgufHeader",
    "GgufTensor",
    "find_gguf",
    "gguf_config",
    "gguf_name",
    "gguf_types",
    "read_gguf_arrays",
    "read_gguf_header",
    "type_bits",
]
