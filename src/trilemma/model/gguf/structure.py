"""The structure that a GGUF header describes, as a DecoderConfig.

Enough for byte counts and twins of every llama-shaped architecture; for running the weights, `refuse_to_run`
names what this structure leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.model.config import Attention, DecoderConfig, Dense, Experts, LayerSpec, Rope
from trilemma.model.gguf.header import GgufHeader, GgufTensor
from trilemma.model.gguf.names import gguf_name
from trilemma.model.rope import RopeKind, make_rope

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "mistral3")
RUNNABLE = ("llama", "qwen2", "qwen3")  # also the family of the same name
ROPE_FACTORS = "rope_freqs.weight"
_NEUTRAL = {
    "attention.scale": 0.0, "residual_scale": 1.0, "embedding_scale": 1.0, "logit_scale": 1.0, "rope.scale_linear": 1.0,
    "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "rope.scaling.attn_factor": 1.0,
}  # fmt: skip
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LLAMA3_ORIGINALS = [8192, *(1 << power for power in range(5, 18))]


def gguf_config(header: GgufHeader) -> DecoderConfig:
    """The structure that a header describes. Family 'llama' stands for what is not RUNNABLE: that is for cost alone.

    Raises:
        UnsupportedModelError: an architecture whose layers are not llama-shaped.
        CheckpointError: metadata and tensors contradict each other.
    """
    if header.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"GGUF architecture '{header.architecture}' can not be translated. Known: {', '.join(ARCHITECTURES)}. "
            "Start from the Hugging Face folder that the file was made from instead."
        )
    embedding = _tensor(header, "token_embd.weight")
    dim, count = _number(header, "embedding_length"), _number(header, "block_count")
    if count > len(header.tensors):
        raise CheckpointError(f"GGUF metadata claim {count} layers; the file has {len(header.tensors)} tensors.")
    vocab = embedding.shape[0]
    config = DecoderConfig(
        family=header.architecture if header.architecture in RUNNABLE else "llama",
        dim=dim, vocab_size=vocab, max_context=_number(header, "context_length"),
        layers=tuple(_layer(header, index, dim) for index in range(count)),
        norm_eps=_float(header, "attention.layer_norm_rms_epsilon", 1e-5), tied="output.weight" not in header.tensors,
        bos_token_id=next(_token_ids(header, ("bos_token_id",), vocab), None),
        eos_token_ids=tuple(dict.fromkeys(_token_ids(header, _ENDS, vocab))),
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


def refuse_to_run(header: GgufHeader, config: DecoderConfig) -> None:
    """Raise UnsupportedModelError for what would make the weights mean something else than `config` says."""
    if header.architecture not in RUNNABLE:
        raise _refusal(f"the architecture '{header.architecture}' (read: {', '.join(RUNNABLE)})")
    if any(isinstance(layer.ffn, Experts) for layer in config.layers):
        raise _refusal("experts")
    for key, neutral in _NEUTRAL.items():
        value = header.metadata.get(f"{header.architecture}.{key}", neutral)
        if value != neutral:
            raise _refusal(f"'{header.architecture}.{key}' of {value!r}")
    for layer in config.layers:
        rope = layer.attention.rope if layer.attention else None
        if layer.attention and (rope is None or 2 * len(rope.inverse_frequencies) != layer.attention.head_dim):
            raise _refusal("heads that do not rotate in all dimensions")
    known = {gguf_name(name) for name in config.tensor_shapes()} | {ROPE_FACTORS}
    unknown = sorted(set(header.tensors) - known)
    if unknown:
        raise _refusal(f"the tensor '{unknown[0]}'" + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""))


def with_rope_factors(config: DecoderConfig, factors: NDArray[np.float32]) -> DecoderConfig:
    """The config with its inverse frequencies divided by `factors` (head_dim / 2,), as Llama 3.1 scales them.

    Where the factors are llama3's of a usual setting, the rope says so with its parameters; else it is a table alone.

    Raises:
        CheckpointError: factors of another length, or not above 0.
    """
    layers = []
    for layer in config.layers:
        spec = layer.attention
        if spec is not None and spec.rope is not None:
            if factors.shape != (spec.head_dim // 2,) or not np.all(np.isfinite(factors) & (factors > 0)):
                raise CheckpointError(
                    f"GGUF tensor '{ROPE_FACTORS}' must hold {spec.head_dim // 2} numbers above 0: the file is damaged."
                )
            rope = _divided(spec.rope, factors, spec.head_dim)
            layer = layer.model_copy(update={"attention": spec.model_copy(update={"rope": rope})})
        layers.append(layer)
    return config.model_copy(update={"layers": tuple(layers)})


def _divided(rope: Rope, factors: NDArray[np.float32], head_dim: int) -> Rope:
    plain = make_rope("default", rope.theta, {}, head_dim=head_dim)
    base = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wanted = base / factors.astype(np.float64)
    for original in _LLAMA3_ORIGINALS:
        parameters = {
            "factor": _shortest(float(factors.max())), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": float(original),
        }  # fmt: skip
        found = make_rope("llama3", rope.theta, parameters, head_dim=head_dim)
        if np.allclose(found.inverse_frequencies, wanted, rtol=1e-6, atol=0):
            return found
    table = tuple(float(value) for value in wanted.astype(np.float32))
    return plain.model_copy(update={"kind": "llama3", "inverse_frequencies": table})


def _layer(header: GgufHeader, index: int, dim: int) -> LayerSpec:
    heads = _number(header, "attention.head_count", index)
    kv_heads = _number(header, "attention.head_count_kv", index, default=heads)
    head_dim = _number(header, "attention.key_length", default=dim // heads)
    window = header.metadata.get(f"{header.architecture}.attention.sliding_window")
    names = header.tensors
    attention = Attention(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5, rope=_rope(header, head_dim),
        window=int(window) if isinstance(window, int) and window > 0 else None,
        qkv_bias=f"blk.{index}.attn_q.bias" in names, o_bias=f"blk.{index}.attn_output.bias" in names,
        qk_norm=f"blk.{index}.attn_q_norm.weight" in names,
    )  # fmt: skip
    return LayerSpec(attention=attention, ffn=_ffn(header, index))


def _rope(header: GgufHeader, head_dim: int) -> Rope:
    rotary = min(_number(header, "rope.dimension_count", default=head_dim), head_dim) // 2 * 2
    theta = _float(header, "rope.freq_base", 10000.0)
    kind = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    parameters: dict[str, float] = {}
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"GGUF rope scaling '{kind}' can not be translated. Known: none, linear, yarn, and a table of factors."
        )
    if kind != "none":
        parameters["factor"] = _float(header, "rope.scaling.factor", 1.0)
    if kind == "yarn":
        original = _number(header, "rope.scaling.original_context_length", default=_number(header, "context_length"))
        parameters["original_max_position_embeddings"] = float(original)
    return make_rope(cast(RopeKind, "default" if kind == "none" else kind), theta, parameters, head_dim=rotary)


def _ffn(header: GgufHeader, index: int) -> Dense | Experts:
    merged = header.tensors.get(f"blk.{index}.ffn_up_exps.weight")
    if merged is None:
        biased = {role for role in ("gate", "up", "down") if f"blk.{index}.ffn_{role}.bias" in header.tensors}
        hidden = _tensor(header, f"blk.{index}.ffn_up.weight").shape[0]
        return Dense(hidden=hidden, bias="up" in biased, down_bias=biased == {"down"})
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


def _float(header: GgufHeader, key: str, default: float) -> float:
    """A positive number of the architecture's metadata: the shortest decimal that is the stored f32."""
    full = f"{header.architecture}.{key}"
    value = header.metadata.get(full, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"GGUF metadata '{full}' is {value!r}; expected a positive number.")
    return _shortest(float(value))


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _token_ids(header: GgufHeader, keys: tuple[str, ...], vocab: int) -> Iterator[int]:
    for key in keys:
        value = header.metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab:
            yield value


def _tensor(header: GgufHeader, name: str) -> GgufTensor:
    if name not in header.tensors:
        raise CheckpointError(f"The GGUF file has no tensor '{name}'. It has {len(header.tensors)} others.")
    return header.tensors[name]


def _refusal(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"This GGUF file has {what}, which the engines here do not run. Use --runtime llama.cpp, or start from the "
        "Hugging Face folder that the file was made from."
    )
