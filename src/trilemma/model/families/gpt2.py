"""GPT-2: layer norms with bias, learned positions, biases everywhere, q, k and v in one matrix, stored (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from trilemma.model.config import Attention, DecoderConfig, Dense, LayerSpec, Nonlinearity
from trilemma.model.families import fields
from trilemma.model.families.place import Place, Rows
from trilemma.model.families.translation import Translation, attentions, divided_head_dim

GELUS: Mapping[str, Nonlinearity] = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip


class Gpt2(Translation):
    """GPT2LMHeadModel. Published files leave out the 'transformer.' that newer ones write."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    aliases = (("transformer.", ""),)
    stem: ClassVar[str] = "transformer.h.{}"
    outer: ClassVar[Mapping[str, str]] = {
        "embedding": "transformer.wte",
        "position": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    }
    inner: ClassVar[Mapping[str, str]] = {
        "attention_norm": "ln_1",
        "ffn_norm": "ln_2",
        **{f"attention.{role}": "attn.c_attn" for role in "qkv"},
        "attention.o": "attn.c_proj",
        "ffn.up": "mlp.c_fc",
        "ffn.down": "mlp.c_proj",
    }

    def read_config(self, raw: Mapping[str, Any]) -> DecoderConfig:
        fields.refuse_quantized(raw)
        fields.refuse_unless(raw, "add_cross_attention", [False])
        fields.refuse_unless(raw, "activation_function", list(GELUS))
        dim, heads = fields.positive_int(raw, "n_embd"), fields.positive_int(raw, "n_head")
        layers, vocab = fields.positive_int(raw, "n_layer"), fields.positive_int(raw, "vocab_size")
        head_dim = divided_head_dim(raw, "n_embd", dim, heads)
        ffn = Dense(
            hidden=fields.positive_int(raw, "n_inner", 4 * dim), gated=False, bias=True,
            activation=GELUS[raw.get("activation_function") or "gelu_new"],
        )  # fmt: skip
        scale = head_dim**-0.5 if fields.flag(raw, "scale_attn_weights", True) else 1.0
        by_depth = fields.flag(raw, "scale_attn_by_inverse_layer_idx", False)
        attention = Attention(
            heads=heads, kv_heads=heads, head_dim=head_dim, rope=None, scale=scale, qkv_bias=True, o_bias=True
        )
        scales = [scale / (index + 1) if by_depth else scale for index in range(layers)]
        return DecoderConfig(
            family=self.model_type,
            dim=dim,
            vocab_size=vocab,
            max_context=fields.positive_int(raw, "n_positions", 1024),
            layers=tuple(LayerSpec(attention=attention.model_copy(update={"scale": s}), ffn=ffn) for s in scales),
            norm_eps=fields.positive_float(raw, "layer_norm_epsilon", 1e-5),
            tied=fields.flag(raw, "tie_word_embeddings", True),
            norm="layer",
            norm_bias=True,
            learned_positions=True,
            bos_token_id=fields.token_id(raw, "bos_token_id", vocab),
            eos_token_ids=fields.token_ids(raw, "eos_token_id", vocab),
        )

    def written_keys(self, config: DecoderConfig) -> dict[str, Any]:
        attention, ffn = attentions(config)[0], config.layers[0].ffn
        if not isinstance(ffn, Dense):
            raise self._cannot_write("layer 0 has experts")
        last = attentions(config)[-1]
        return {
            "n_embd": config.dim,
            "n_head": attention.heads,
            "n_layer": len(config.layers),
            "n_positions": config.max_context,
            "n_inner": ffn.hidden,
            "activation_function": next(theirs for theirs, ours in GELUS.items() if ours == ffn.activation),
            "layer_norm_epsilon": config.norm_eps,
            "scale_attn_weights": attention.scale != 1.0,
            "scale_attn_by_inverse_layer_idx": last.scale != attention.scale,
        }

    def layer_place(self, index: int, part: str, leaf: str, config: DecoderConfig) -> Place:
        found = replace(
            super().layer_place(index, part, leaf, config),
            transposed=leaf == "weight" and not part.endswith("norm"),
        )
        attention = config.layers[index].attention
        if part in ("attention.q", "attention.k", "attention.v") and attention is not None:
            size = attention.heads * attention.head_dim
            return replace(found, rows=Rows("qkv".index(part[-1]) * size, size, 3 * size))
        return found


GPT2 = Gpt2()
