"""Llama (1 to 3.2, and the many that share its `model_type`): GQA, RMS norms, gated SiLU, full attention.

Mistral and Qwen2 are variations of it and build on `LlamaLike`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.model.config import Attention, DecoderConfig, Dense, LayerSpec, Rope
from trilemma.model.families import fields
from trilemma.model.rope import context_with_rope, read_rope, write_rope

_OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_INNER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attention.{role}": f"self_attn.{role}_proj" for role in "qkvo"},
    **{f"ffn.{role}": f"mlp.{role}_proj" for role in ("gate", "up", "down")},
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_HARMLESS = re.compile(r"(model\.layers\.\d+\.self_attn\.)?(model\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


class LlamaLike:
    """What the Llama-shaped families share; a family overrides the questions that it answers otherwise."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    default_eps: ClassVar[float] = 1e-6

    def biases(self, raw: fields.Raw) -> tuple[bool, bool, bool]:
        """Biases of (q k v, o, feed-forward)."""
        raise NotImplementedError

    def windows(self, raw: fields.Raw, layers: int) -> list[int | None]:
        """The attention window of each layer, None for all positions."""
        raise NotImplementedError

    def head_dim(self, raw: fields.Raw, dim: int, heads: int) -> int:
        found = fields.optional_int(raw, "head_dim")
        if found is None and dim % heads:
            raise CheckpointError(
                f"config.json: 'hidden_size' {dim} is no multiple of 'num_attention_heads' {heads}, "
                "and 'head_dim' is not given."
            )
        return found or dim // heads

    def read_config(self, raw: Mapping[str, Any]) -> DecoderConfig:
        fields.refuse_quantized(raw)
        fields.refuse_unless(raw, "hidden_act", ["silu", "swish"])
        fields.refuse_unless(raw, "is_decoder", [True, False])
        dim = fields.positive_int(raw, "hidden_size")
        layers = fields.positive_int(raw, "num_hidden_layers")
        context = fields.positive_int(raw, "max_position_embeddings", 2048)
        vocab = fields.positive_int(raw, "vocab_size")
        attention = self._attention(raw, dim, context)
        ffn = Dense(hidden=fields.positive_int(raw, "intermediate_size"), bias=self.biases(raw)[2])
        windows = self.windows(raw, layers)
        assert attention.rope is not None
        return DecoderConfig(
            family=self.model_type,
            dim=dim,
            vocab_size=vocab,
            max_context=context_with_rope(attention.rope, context),
            layers=tuple(
                LayerSpec(attention=attention.model_copy(update={"window": window}), ffn=ffn) for window in windows
            ),
            norm_eps=fields.positive_float(raw, "rms_norm_eps", self.default_eps),
            tied=fields.flag(raw, "tie_word_embeddings", False),
            bos_token_id=fields.token_id(raw, "bos_token_id", vocab),
            eos_token_ids=fields.token_ids(raw, "eos_token_id", vocab),
        )

    def _attention(self, raw: fields.Raw, dim: int, context: int) -> Attention:
        heads = fields.positive_int(raw, "num_attention_heads")
        kv_heads = fields.positive_int(raw, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: 'num_attention_heads' {heads} is no multiple of 'num_key_value_heads' {kv_heads}."
            )
        head_dim = self.head_dim(raw, dim, heads)
        if head_dim % 2:
            raise CheckpointError(f"config.json: the head dimension is {head_dim}; rotary embedding needs an even one.")
        qkv_bias, o_bias, _ = self.biases(raw)
        return Attention(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5,
            rope=read_rope(raw, head_dim=head_dim, max_context=context), qkv_bias=qkv_bias, o_bias=o_bias,
        )  # fmt: skip

    def write_config(self, config: DecoderConfig) -> dict[str, Any]:
        attention, ffn = self._same_everywhere(config)
        assert attention.rope is not None
        ends = list(config.eos_token_ids)
        written: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": config.dim,
            "intermediate_size": ffn.hidden,
            "num_hidden_layers": len(config.layers),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_context,
            "rms_norm_eps": config.norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": config.tied,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            **write_rope(attention.rope),
            **self.write_options(config, attention, ffn),
        }
        difference = _first_difference(self.read_config(written), config)
        if difference is not None:
            raise self._cannot_write(f"'{difference}' has no equivalent there")
        return written

    def write_options(self, config: DecoderConfig, attention: Attention, ffn: Dense) -> dict[str, Any]:
        """The keys of config.json that this family alone has."""
        raise NotImplementedError

    def tensor_name(self, name: str) -> str:
        if name in _OUTER:
            return _OUTER[name]
        match = _LAYER.fullmatch(name)
        if match is None or match[2] not in _INNER:
            raise KeyError(name)
        return f"model.layers.{match[1]}.{_INNER[match[2]]}.{match[3]}"

    def is_harmless(self, name: str, config: DecoderConfig) -> bool:
        return (config.tied and name == "lm_head.weight") or _HARMLESS.fullmatch(name) is not None

    def _same_everywhere(self, config: DecoderConfig) -> tuple[Attention, Dense]:
        first = config.layers[0]
        if first.attention is None or first.ffn is None:
            raise self._cannot_write("layer 0 lacks its attention or its feed-forward block")
        for index, layer in enumerate(config.layers):
            plain = layer.attention and layer.attention.model_copy(update={"window": first.attention.window})
            if plain != first.attention or layer.ffn != first.ffn:
                raise self._cannot_write(f"layer {index} differs from layer 0")
        if first.attention.rope is None:
            raise self._cannot_write("its attention has no rotary embedding")
        return first.attention, first.ffn

    def _cannot_write(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"This model can not be written as {self.architecture}: {why}. Save it as an artifact instead."
        )


def _first_difference(found: DecoderConfig, wanted: DecoderConfig) -> str | None:
    """The first field that does not survive; frequency tables count as equal when they are so to f32 accuracy."""
    for key in sorted(DecoderConfig.model_fields):
        if key != "layers" and getattr(found, key) != getattr(wanted, key):
            return key
    for ours, theirs in zip(found.layers, wanted.layers, strict=True):
        assert ours.attention is not None
        rope = theirs.attention.rope if theirs.attention else None
        if rope is None or not _same_rope(ours.attention.rope, rope):
            return "rope"
        adapted = ours.attention.model_copy(update={"rope": rope})
        if theirs != ours.model_copy(update={"attention": adapted}):
            return "layers"
    return None


def _same_rope(found: Rope | None, wanted: Rope) -> bool:
    return (
        found is not None
        and len(found.inverse_frequencies) == len(wanted.inverse_frequencies)
        and np.allclose(found.inverse_frequencies, wanted.inverse_frequencies, rtol=1e-6, atol=0)
        and abs(found.attention_factor - wanted.attention_factor) <= 1e-6
    )


class Llama(LlamaLike):
    """LlamaForCausalLM: optional biases, no window."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def biases(self, raw: fields.Raw) -> tuple[bool, bool, bool]:
        attention = fields.flag(raw, "attention_bias", False)
        return attention, attention, fields.flag(raw, "mlp_bias", False)

    def windows(self, raw: fields.Raw, layers: int) -> list[int | None]:
        # transformers' Llama has no window: a checkpoint that asks for one was meant for other code
        fields.refuse_unless(raw, "sliding_window", [])
        return [None] * layers

    def write_options(self, config: DecoderConfig, attention: Attention, ffn: Dense) -> dict[str, Any]:
        return {"attention_bias": attention.qkv_bias, "mlp_bias": ffn.bias}


LLAMA = Llama()
