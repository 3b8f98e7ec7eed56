"""Llama (1 to 3.2, and the many that share its `model_type`): GQA, RMS norms, gated SiLU, full attention.

Most other families are variations of it and build on `LlamaLike`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from trilemma.core.errors import CheckpointError
from trilemma.model.config import Attention, DecoderConfig, Dense, Experts, LayerSpec, Nonlinearity, Rope
from trilemma.model.families import fields
from trilemma.model.families.translation import Translation, attentions, check_heads
from trilemma.model.rope import context_with_rope, read_rope, write_rope

Ffn = Dense | Experts


class LlamaLike(Translation):
    """What the Llama-shaped families share; a family overrides the questions that it answers otherwise."""

    default_eps: ClassVar[float] = 1e-6
    default_theta: ClassVar[float] = 10000.0
    default_tied: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    activation_key: ClassVar[str] = "hidden_act"
    activations: ClassVar[Mapping[str, Nonlinearity]] = {"silu": "silu", "swish": "silu"}
    stem: ClassVar[str] = "model.layers.{}"
    outer: ClassVar[Mapping[str, str]] = {
        "embedding": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
    }
    inner: ClassVar[Mapping[str, str]] = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attention.{role}": f"self_attn.{role}_proj" for role in "qkvo"},
        **{f"attention.{role}_norm": f"self_attn.{role}_norm" for role in "qk"},
        **{f"ffn.{role}": f"mlp.{role}_proj" for role in ("gate", "up", "down")},
    }

    def biases(self, raw: fields.Raw) -> tuple[bool, bool, bool]:
        """Biases of (q k v, o, feed-forward)."""
        raise NotImplementedError

    def windows(self, raw: fields.Raw, layers: int) -> list[int | None]:
        """The attention window of each layer, None for all positions."""
        raise NotImplementedError

    def written_options(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of config.json that this family alone has."""
        raise NotImplementedError

    def refuse_options(self, raw: fields.Raw) -> None:
        """Raise UnsupportedModelError for an option of this family that we do not run."""

    def head_dim(self, raw: fields.Raw, dim: int, heads: int) -> int:
        found = fields.optional_int(raw, "head_dim")
        if found is None and dim % heads:
            raise CheckpointError(
                f"config.json: 'hidden_size' {dim} is no multiple of 'num_attention_heads' {heads}, "
                "and 'head_dim' is not given."
            )
        return found or dim // heads

    def scale(self, raw: fields.Raw, head_dim: int) -> float:
        return float(head_dim**-0.5)

    def rope(self, raw: fields.Raw, head_dim: int, context: int) -> Rope:
        return read_rope(raw, head_dim=head_dim, max_context=context, default_theta=self.default_theta)

    def ropes(self, raw: fields.Raw, head_dim: int, context: int, layers: int) -> list[Rope]:
        return [self.rope(raw, head_dim, context)] * layers

    def ffns(self, raw: fields.Raw, layers: int) -> list[Ffn]:
        hidden = fields.positive_int(raw, "intermediate_size")
        return [Dense(hidden=hidden, activation=self.activation(raw), bias=self.biases(raw)[2])] * layers

    def layer(self, attention: Attention, ffn: Ffn) -> LayerSpec:
        return LayerSpec(attention=attention, ffn=ffn)

    def config_options(self, dim: int) -> dict[str, Any]:
        """Fields of DecoderConfig that this family alone sets."""
        return {}

    def activation(self, raw: fields.Raw) -> Nonlinearity:
        fields.refuse_unless(raw, self.activation_key, list(self.activations))
        return self.activations[raw.get(self.activation_key) or next(iter(self.activations))]

    def read_config(self, raw: Mapping[str, Any]) -> DecoderConfig:
        fields.refuse_quantized(raw)
        fields.refuse_unless(raw, "is_decoder", [True, False])
        self.refuse_options(raw)
        dim = fields.positive_int(raw, "hidden_size")
        layers = fields.positive_int(raw, "num_hidden_layers")
        context = fields.positive_int(raw, "max_position_embeddings", 2048)
        vocab = fields.positive_int(raw, "vocab_size")
        attention = self._attention(raw, dim)
        ropes = self.ropes(raw, attention.head_dim, context, layers)
        specs = [
            self.layer(attention.model_copy(update={"window": window, "rope": rope}), ffn)
            for window, rope, ffn in zip(self.windows(raw, layers), ropes, self.ffns(raw, layers), strict=True)
        ]
        return DecoderConfig(
            family=self.model_type,
            dim=dim,
            vocab_size=vocab,
            max_context=context_with_rope(ropes[-1], context),
            layers=tuple(specs),
            norm_eps=fields.positive_float(raw, "rms_norm_eps", self.default_eps),
            tied=fields.flag(raw, "tie_word_embeddings", self.default_tied),
            bos_token_id=fields.token_id(raw, "bos_token_id", vocab),
            eos_token_ids=fields.token_ids(raw, "eos_token_id", vocab),
            **self.config_options(dim),
        )

    def _attention(self, raw: fields.Raw, dim: int) -> Attention:
        heads = fields.positive_int(raw, "num_attention_heads")
        kv_heads = fields.positive_int(raw, "num_key_value_heads", heads)
        check_heads(heads, kv_heads)
        head_dim = self.head_dim(raw, dim, heads)
        if head_dim % 2:
            raise CheckpointError(f"config.json: the head dimension is {head_dim}; rotary embedding needs an even one.")
        qkv_bias, o_bias, _ = self.biases(raw)
        return Attention(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=self.scale(raw, head_dim), rope=None,
            qkv_bias=qkv_bias, o_bias=o_bias, qk_norm=self.qk_norm,
        )  # fmt: skip

    def written_keys(self, config: DecoderConfig) -> dict[str, Any]:
        attention = attentions(config)[0]
        if attention.rope is None:
            raise self._cannot_write("its attention has no rotary embedding")
        dense = [layer.ffn for layer in config.layers if isinstance(layer.ffn, Dense)]
        used = next(layer.ffn.activation for layer in config.layers if layer.ffn is not None)
        return {
            "hidden_size": config.dim,
            **({"intermediate_size": dense[0].hidden} if dense else {}),
            "num_hidden_layers": len(config.layers),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "max_position_embeddings": config.max_context,
            "rms_norm_eps": config.norm_eps,
            self.activation_key: next((theirs for theirs, ours in self.activations.items() if ours == used), used),
            **write_rope(attention.rope),
            **self.written_options(config),
        }


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

    def written_options(self, config: DecoderConfig) -> dict[str, Any]:
        ffn = config.layers[0].ffn
        return {
            "attention_bias": attentions(config)[0].qkv_bias,
            "mlp_bias": isinstance(ffn, Dense) and ffn.bias,
        }


LLAMA = Llama()
