"""GGUF headers: what a file says about its model, without reading a weight.

Metadata and the list of tensors become a DecoderConfig and one GGML type a matrix: enough for byte
counts and for a twin of random weights that costs what the file's model costs. Nothing in a file is
executed, and every length is checked against the file's size before it is used. Left out: tensor
data, the vocabulary's strings, and architectures whose layers are not llama-shaped.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import BinaryIO, cast

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.core.record import Record
from trilemma.model.config import Attention, DecoderConfig, Dense, Experts, LayerSpec
from trilemma.model.rope import make_rope

Value = int | float | bool | str | tuple[int | float | bool, ...]

# id -> (name, values in a block, bytes of a block), as in ggml.h
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "mistral3")

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 1 << 20  # of metadata or tensors: more is damage, not a model
_KEPT_ARRAY = 4096  # numbers a layer are kept; scores of a vocabulary are not
_ROLES = {
    "attention_norm": "attn_norm", "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v",
    "attention.o": "attn_output", "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm", "ffn.gate": "ffn_gate", "ffn.up": "ffn_up", "ffn.down": "ffn_down",
    "ffn.router": "ffn_gate_inp",
}  # fmt: skip
_ENDS = {
    "embedding.weight": "token_embd.weight",
    "final_norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}
_EXPERT = re.compile(r"ffn\.experts\.\d+\.(gate|up|down)")
_SHARED = re.compile(r"ffn\.shared\.(gate|up|down)")
_SHARD = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")


class GgufTensor(Record):
    """One tensor of the file: (out, in) order, experts first where there are some."""

    shape: tuple[int, ...]
    type: str
    nbytes: int


class GgufHeader(Record):
    """`array_lengths` holds every array's length; `metadata` the values of short numeric ones."""

    version: int
    metadata: dict[str, Value]
    array_lengths: dict[str, int]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def weights_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def gguf_name(name: str) -> str:
    """GGUF's name of a canonical tensor name; all experts of a layer share one tensor there."""
    if name in _ENDS:
        return _ENDS[name]
    _, layer, rest = name.split(".", 2)
    role, _, leaf = rest.rpartition(".")
    if match := _EXPERT.fullmatch(role):
        return f"blk.{layer}.ffn_{match[1]}_exps.{leaf}"
    if match := _SHARED.fullmatch(role):
        return f"blk.{layer}.ffn_{match[1]}_shexp.{leaf}"
    return f"blk.{layer}.{_ROLES[role]}.{leaf}"


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only model in a folder (its first shard); else None.

    Raises:
        CheckpointError: a folder with several GGUF models.
    """
    place = Path(path)
    if place.is_file():
        return place if place.suffix == ".gguf" or _magic(place) == b"GGUF" else None
    if not place.is_dir() or (place / "config.json").is_file() or (place / "trilemma.json").is_file():
        return None
    found = sorted(place.glob("*.gguf"))
    first = [file for file in found if _SHARD.fullmatch(file.name) or not re.search(r"-of-\d{5}\.gguf$", file.name)]
    if len(first) > 1:
        raise CheckpointError(
            f"'{place}' has {len(first)} GGUF models; name one: {', '.join(f.name for f in first[:4])}."
        )
    return first[0] if first else None


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Metadata and tensor list of a GGUF file, and of its further shards.

    Raises:
        CheckpointError: no GGUF, an unknown version, or a length that can not be true.
    """
    place = Path(path)
    header = _read_one(place)
    shards = _SHARD.fullmatch(place.name)
    if shards is None:
        return header
    tensors = dict(header.tensors)
    for number in range(2, int(shards[2]) + 1):
        tensors |= _read_one(place.with_name(f"{shards[1]}-{number:05d}-of-{shards[2]}.gguf")).tensors
    return header.model_copy(update={"tensors": tensors})


def gguf_config(header: GgufHeader) -> DecoderConfig:
    """The structure that a header describes. Family 'llama' stands for all: for cost, not for running the weights.

    Raises:
        UnsupportedModelError: an architecture whose layers are not llama-shaped.
        CheckpointError: metadata and tensors contradict each other.
    """
    if header.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"GGUF architecture '{header.architecture}' can not be translated. Known: {', '.join(ARCHITECTURES)}. "
            "Inspect the Hugging Face folder that the file was made from instead."
        )
    embedding = _tensor(header, "token_embd.weight")
    dim, count = _number(header, "embedding_length"), _number(header, "block_count")
    config = DecoderConfig(
        family="llama", dim=dim, vocab_size=embedding.shape[0], max_context=_number(header, "context_length"),
        layers=tuple(_layer(header, index, dim) for index in range(count)),
        norm_eps=1e-5, tied="output.weight" not in header.tensors,
    )  # fmt: skip
    for name, shape in config.tensor_shapes().items():
        found = _tensor(header, gguf_name(name)).shape
        if found[-len(shape) :] != shape:
            raise CheckpointError(f"GGUF tensor '{gguf_name(name)}' has shape {found}; the metadata say {shape}.")
    return config


def gguf_types(header: GgufHeader, config: DecoderConfig) -> dict[str, str]:
    """GGML type of every matrix of `config`, by canonical name."""
    return {
        name: header.tensors[gguf_name(name)].type for name, shape in config.tensor_shapes().items() if len(shape) == 2
    }


def type_bits(name: str) -> float:
    """Bits a weight of a GGML type, scales included."""
    return next(8 * size / block for known, block, size in GGML_TYPES.values() if known == name)


def _layer(header: GgufHeader, index: int, dim: int) -> LayerSpec:
    heads = _number(header, "attention.head_count", index)
    kv_heads = _number(header, "attention.head_count_kv", index, default=heads)
    head_dim = _number(header, "attention.key_length", default=dim // heads)
    rotary = _number(header, "rope.dimension_count", default=head_dim)
    theta = header.metadata.get(f"{header.architecture}.rope.freq_base", 10000.0)
    window = header.metadata.get(f"{header.architecture}.attention.sliding_window")
    names = header.tensors
    attention = Attention(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5,
        rope=make_rope("default", float(cast(float, theta)), {}, head_dim=min(rotary, head_dim) // 2 * 2),
        window=int(window) if isinstance(window, int) and window > 0 else None,
        qkv_bias=f"blk.{index}.attn_q.bias" in names, o_bias=f"blk.{index}.attn_output.bias" in names,
        qk_norm=f"blk.{index}.attn_q_norm.weight" in names,
    )  # fmt: skip
    return LayerSpec(attention=attention, ffn=_ffn(header, index))


def _ffn(header: GgufHeader, index: int) -> Dense | Experts:
    merged = header.tensors.get(f"blk.{index}.ffn_up_exps.weight")
    if merged is None:
        return Dense(hidden=_tensor(header, f"blk.{index}.ffn_up.weight").shape[0])
    if len(merged.shape) != 3:
        raise CheckpointError(
            f"GGUF tensor 'blk.{index}.ffn_up_exps.weight' has shape {merged.shape}, not three sizes."
        )
    shared = header.tensors.get(f"blk.{index}.ffn_up_shexp.weight")
    return Experts(
        count=merged.shape[0], active=_number(header, "expert_used_count"), hidden=merged.shape[1],
        shared_hidden=0 if shared is None else shared.shape[0],
    )  # fmt: skip


def _number(header: GgufHeader, key: str, index: int = 0, default: int | None = None) -> int:
    """A positive integer of the architecture's metadata; arrays hold one number a layer."""
    full = f"{header.architecture}.{key}"
    value = header.metadata.get(full, default)
    if isinstance(value, tuple):
        value = value[index] if index < len(value) else None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise CheckpointError(f"GGUF metadata '{full}' is {value!r}; expected a positive number.")
    return value


def _tensor(header: GgufHeader, name: str) -> GgufTensor:
    if name not in header.tensors:
        raise CheckpointError(f"The GGUF file has no tensor '{name}'. It has {len(header.tensors)} others.")
    return header.tensors[name]


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _read_one(path: Path) -> GgufHeader:
    try:
        with path.open("rb") as file:
            return _Reader(file, path).header()
    except OSError as error:
        raise CheckpointError(f"Can not read '{path}': {error.strerror or error}.") from None


class _Reader:
    """Little-endian values from a file whose size bounds every length."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._left = path.stat().st_size

    def header(self) -> GgufHeader:
        if self._take(4) != b"GGUF":
            raise CheckpointError(f"'{self._path}' is no GGUF file.")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise CheckpointError(
                f"'{self._path}' has GGUF version {version}; versions 2 and 3 are read. Convert it again."
            )
        tensors, entries = self._count("tensors"), self._count("metadata")
        metadata: dict[str, Value] = {}
        lengths: dict[str, int] = {}
        for _ in range(entries):
            key = self._string()
            value = self._value(int(self._scalar("<I")), key, lengths)
            if value is not None:
                metadata[key] = value
        found = dict(self._tensor_info() for _ in range(tensors))
        return GgufHeader(version=int(version), metadata=metadata, array_lengths=lengths, tensors=found)

    def _take(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise CheckpointError(f"'{self._path}' ends inside its header: it is damaged or cut. Fetch it again.")
        return self._file.read(size)

    def _skip(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise CheckpointError(f"'{self._path}' ends inside its header: it is damaged or cut. Fetch it again.")
        self._file.seek(size, 1)

    def _scalar(self, form: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _count(self, what: str) -> int:
        count = int(self._scalar("<Q"))
        if count > _MOST_ENTRIES:
            raise CheckpointError(f"'{self._path}' claims {count} {what}: it is damaged. Fetch it again.")
        return count

    def _string(self) -> str:
        return self._take(int(self._scalar("<Q"))).decode("utf-8", errors="replace")

    def _value(self, kind: int, key: str, lengths: dict[str, int]) -> Value | None:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(f"'{self._path}': metadata '{key}' has the unknown type {kind}.")
        inner, count = int(self._scalar("<I")), int(self._scalar("<Q"))
        lengths[key] = count
        if inner == _STRING:
            if 8 * count > self._left:
                raise CheckpointError(f"'{self._path}': array '{key}' claims {count} strings: the file is damaged.")
            for _ in range(count):
                self._skip(int(self._scalar("<Q")))
            return None
        if inner not in _SCALARS:
            raise CheckpointError(f"'{self._path}': array '{key}' has the unknown type {inner}.")
        size = struct.calcsize(_SCALARS[inner])
        if count > _KEPT_ARRAY:
            self._skip(count * size)
            return None
        return struct.unpack(f"<{count}{_SCALARS[inner][1]}", self._take(count * size))

    def _tensor_info(self) -> tuple[str, GgufTensor]:
        name, dimensions = self._string(), int(self._scalar("<I"))
        if not 1 <= dimensions <= 4:
            raise CheckpointError(f"'{self._path}': tensor '{name}' has {dimensions} dimensions; 1 to 4 are possible.")
        sizes = [int(self._scalar("<Q")) for _ in range(dimensions)]
        kind = int(self._scalar("<I"))
        self._scalar("<Q")  # the offset of data that is not read
        if kind not in GGML_TYPES:
            raise CheckpointError(f"'{self._path}': tensor '{name}' has the GGML type {kind}, which is not known here.")
        type_name, block, size = GGML_TYPES[kind]
        values = math.prod(sizes)
        if not values or sizes[0] % block or values >= 1 << 48:
            raise CheckpointError(
                f"'{self._path}': tensor '{name}' of type {type_name} can not have the sizes {sizes}."
            )
        shape = tuple(reversed(sizes))
        return name, GgufTensor(shape=shape, type=type_name, nbytes=values // block * size)
