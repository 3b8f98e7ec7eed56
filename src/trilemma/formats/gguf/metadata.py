"""What a GGUF file says about a model besides its tensors: structure, rope, vocabulary.

A structure that the GGUF architecture can not say is refused by name. Layers may differ in their
numbers of heads and hidden units, which GGUF keeps as arrays, but not in the kinds of their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import UnsupportedModelError
from trilemma.formats.gguf.vocabulary import Vocabulary
from trilemma.model.config import Attention, DecoderConfig, Dense, Experts, Rope

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18,
    "BF16": 32, "Q2_K": 10, "Q3_K": 11, "IQ4_NL": 25,
}  # fmt: skip
_YARN_KEYS = {"factor", "original_max_position_embeddings"}


@dataclass(frozen=True)
class Shape:
    """A config that GGUF can express."""

    architecture: str
    config: DecoderConfig
    attention: tuple[Attention, ...]
    ffn: tuple[Dense, ...]
    rope: Rope
    notes: list[str] = field(default_factory=list)

    @property
    def head_dim(self) -> int:
        return self.attention[0].head_dim


def read_shape(config: DecoderConfig) -> Shape:
    """Check that llama.cpp has an architecture for this config.

    Raises:
        UnsupportedModelError: it has not; the message says which part.
    """
    if config.family not in ARCHITECTURES:
        raise _refuse(f"the family '{config.family}' (known: {', '.join(ARCHITECTURES)})")
    architecture = ARCHITECTURES[config.family]
    attention = tuple(layer.attention for layer in config.layers if layer.attention is not None)
    if any(isinstance(layer.ffn, Experts) for layer in config.layers):
        raise _refuse("experts")
    ffn = tuple(layer.ffn for layer in config.layers if isinstance(layer.ffn, Dense))
    if not config.layers or len(attention) != len(config.layers) or len(ffn) != len(config.layers):
        raise _refuse("layers without attention or feed-forward part")
    _refuse_structure(config, architecture, attention, ffn)
    first = attention[0]
    if any((a.head_dim, a.rope) != (first.head_dim, first.rope) for a in attention):
        raise _refuse("layers with different head dimensions or rotary embeddings")
    if first.rope is None or 2 * len(first.rope.inverse_frequencies) != first.head_dim:
        raise _refuse("attention whose heads do not rotate in all dimensions")
    if any(abs(a.scale * first.head_dim**0.5 - 1) > 1e-6 for a in attention):
        raise _refuse("an attention scale other than 1/sqrt(head_dim)")
    notes = []
    if any(a.window is not None and a.window < config.max_context for a in attention):
        notes.append("sliding windows are not carried over: llama.cpp attends to the whole context")
    return Shape(architecture, config, attention, ffn, first.rope, notes)


def _refuse_structure(
    config: DecoderConfig, architecture: str, attention: Sequence[Attention], ffn: Sequence[Dense]
) -> None:
    """Raise for a part that these architectures of llama.cpp lack; each would be left out in silence otherwise."""
    wrong = {
        "norms other than RMS norms without bias": config.norm != "rms" or config.norm_bias,
        "a scaled embedding": config.embedding_scale != 1.0,
        "learned positions": config.learned_positions,
        "layers whose parts run side by side": any(layer.parallel for layer in config.layers),
        "low-rank pairs beside matrices (eora)": any(layer.low_rank for layer in config.layers),
        "norms behind the parts of a layer": any(layer.post_norms for layer in config.layers),
        "feed-forward blocks other than gated SiLU": any(not f.gated or f.activation != "silu" for f in ffn),
        f"a bias of the attention output in {architecture}": architecture != "llama"
        and any(a.o_bias for a in attention),
        f"a bias of feed-forward blocks in {architecture}": architecture != "llama"
        and any(f.bias or f.down_bias for f in ffn),
        f"heads that do not add up to the model's width of {config.dim} in qwen2": architecture == "qwen2"
        and any(a.heads * a.head_dim != config.dim for a in attention),
        "biases of q, k and v in qwen3": architecture == "qwen3" and any(a.qkv_bias for a in attention),
        f"norms of q and k in {architecture}": architecture != "qwen3" and any(a.qk_norm for a in attention),
        "attention without norms of q and k in qwen3": architecture == "qwen3"
        and any(not a.qk_norm for a in attention),
    }
    for what, found in wrong.items():
        if found:
            raise _refuse(what)


def rope_factors(shape: Shape) -> NDArray[np.float32] | None:
    """Divisors of the plain inverse frequencies (head_dim / 2,), where metadata can not say the scaling."""
    rope = shape.rope
    if rope.kind in ("default", "linear", "yarn"):
        return None
    plain = rope.theta ** (-np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim)
    factors = (plain / np.asarray(rope.inverse_frequencies, dtype=np.float64)).astype(np.float32)
    if np.allclose(factors, 1, rtol=1e-5):
        return None
    if shape.architecture != "llama":
        raise _refuse(f"rope scaling '{rope.kind}' in {shape.architecture}")
    return factors


def write_metadata(gguf: Any, writer: Any, shape: Shape, *, name: str, most: str) -> None:
    """Every key that llama.cpp reads for this architecture; `most` is the type of most matrices."""
    config = shape.config
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[most])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(len(config.layers))
    _one_or_all(writer.add_feed_forward_length, [f.hidden for f in shape.ffn])
    _one_or_all(writer.add_head_count, [a.heads for a in shape.attention])
    _one_or_all(writer.add_head_count_kv, [a.kv_heads for a in shape.attention])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(shape.rope.theta)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _write_rope_scaling(gguf, writer, shape.rope)


def write_vocabulary(writer: Any, found: Vocabulary) -> None:
    """Add a tokenizer's tokens, types and merges or scores to a GGUF writer's metadata."""
    writer.add_tokenizer_model(found.kind)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.add_space_prefix)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    for add, value in (
        (writer.add_bos_token_id, found.bos),
        (writer.add_eos_token_id, found.eos),
        (writer.add_eot_token_id, found.turn_end),
        (writer.add_unk_token_id, found.unknown),
        (writer.add_chat_template, found.chat_template),
    ):
        if value is not None:
            add(value)
    writer.add_add_bos_token(found.add_bos)
    writer.add_add_eos_token(found.add_eos)


def _write_rope_scaling(gguf: Any, writer: Any, rope: Rope) -> None:
    if rope.kind not in ("linear", "yarn"):
        return
    factor = rope.parameters["factor"]
    if rope.kind == "yarn":
        extra = sorted(set(rope.parameters) - _YARN_KEYS)
        usual = 0.1 * float(np.log(factor)) + 1 if factor > 1 else 1.0
        if extra or abs(rope.attention_factor - usual) > 1e-4:
            raise _refuse(f"yarn with {', '.join(extra) or 'another attention factor'}")
        writer.add_rope_scaling_orig_ctx_len(int(rope.parameters["original_max_position_embeddings"]))
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN if rope.kind == "yarn" else gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(factor)


def _one_or_all(add: Callable[[Any], None], values: Sequence[int]) -> None:
    add(values[0] if len(set(values)) == 1 else list(values))


def _refuse(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"GGUF export can not express {what}. Run this model with the native engine instead.")
