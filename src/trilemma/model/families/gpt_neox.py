"""GPT-NeoX (Pythia): layer norms, heads that rotate in part, both halves of a layer reading the same input.

q, k and v lie in one matrix, head by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from trilemma.model.config import Attention, DecoderConfig, Dense, LayerSpec
from trilemma.model.families import fields
from trilemma.model.families.gpt2 import GELUS
from trilemma.model.families.place import Place, Rows
from trilemma.model.families.translation import Translation, attentions, divided_head_dim
from trilemma.model.rope import context_with_rope, read_rope, write_rope


class GptNeox(Translation):
    """GPTNeoXForCausalLM."""

    model_type = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    stem: ClassVar[str] = "gpt_neox.layers.{}"
    outer: ClassVar[Mapping[str, str]] = {
        "embedding": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    }
    inner: ClassVar[Mapping[str, str]] = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attention.{role}": "attention.query_key_value" for role in "qkv"},
        "attention.o": "attention.dense",
        "ffn.up": "mlp.dense_h_to_4h",
        "ffn.down": "mlp.dense_4h_to_h",
    }

    def read_config(self, raw: Mapping[str, Any]) -> DecoderConfig:
        fields.refuse_quantized(raw)
        fields.refuse_unless(raw, "hidden_act", list(GELUS))
        dim, heads = fields.positive_int(raw, "hidden_size"), fields.positive_int(raw, "num_attention_heads")
        layers, vocab = fields.positive_int(raw, "num_hidden_layers"), fields.positive_int(raw, "vocab_size")
        context = fields.positive_int(raw, "max_position_embeddings", 2048)
        head_dim = divided_head_dim(raw, "hidden_size", dim, heads)
        share = fields.positive_float(raw, "rotary_pct", 0.25)
        theta = fields.positive_float(raw, "rotary_emb_base", 10000.0)
        rope = read_rope(raw, head_dim=head_dim, max_context=context, default_theta=theta, default_share=share)
        bias = fields.flag(raw, "attention_bias", True)
        attention = Attention(
            heads=heads, kv_heads=heads, head_dim=head_dim, rope=rope, scale=head_dim**-0.5, qkv_bias=bias, o_bias=bias
        )
        ffn = Dense(
            hidden=fields.positive_int(raw, "intermediate_size"), gated=False, bias=True,
            activation=GELUS[raw.get("hidden_act") or "gelu"],
        )  # fmt: skip
        layer = LayerSpec(attention=attention, ffn=ffn, parallel=fields.flag(raw, "use_parallel_residual", True))
        return DecoderConfig(
            family=self.model_type,
            dim=dim,
            vocab_size=vocab,
            max_context=context_with_rope(rope, context),
            layers=(layer,) * layers,
            norm_eps=fields.positive_float(raw, "layer_norm_eps", 1e-5),
            tied=fields.flag(raw, "tie_word_embeddings", False),
            norm="layer",
            norm_bias=True,
            bos_token_id=fields.token_id(raw, "bos_token_id", vocab),
            eos_token_ids=fields.token_ids(raw, "eos_token_id", vocab),
        )

    def written_keys(self, config: DecoderConfig) -> dict[str, Any]:
        attention, ffn = attentions(config)[0], config.layers[0].ffn
        if not isinstance(ffn, Dense) or attention.rope is None:
            raise self._cannot_write("layer 0 has experts, or no rotary embedding")
        rope = write_rope(attention.rope)
        return {
            "hidden_size": config.dim,
            "num_attention_heads": attention.heads,
            "num_hidden_layers": len(config.layers),
            "intermediate_size": ffn.hidden,
            "max_position_embeddings": config.max_context,
            "hidden_act": next(theirs for theirs, ours in GELUS.items() if ours == ffn.activation),
            "layer_norm_eps": config.norm_eps,
            "attention_bias": attention.qkv_bias,
            "use_parallel_residual": config.layers[0].parallel,
            "rotary_pct": attention.rope.parameters.get("partial_rotary_factor", 1.0),
            "rotary_emb_base": rope.pop("rope_theta"),
            **rope,
        }

    def layer_place(self, index: int, part: str, leaf: str, config: DecoderConfig) -> Place:
        found = super().layer_place(index, part, leaf, config)
        attention = config.layers[index].attention
        if part in ("attention.q", "attention.k", "attention.v") and attention is not None:
            size = attention.head_dim
            return replace(found, rows=Rows("qkv".index(part[-1]) * size, size, 3 * size, attention.heads))
        return found


GPT_NEOX = GptNeox()
