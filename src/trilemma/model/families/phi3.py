"""Phi-3 and Phi-4-mini: Llama's layers, with q, k and v in one matrix, gate and up in another, and long rope.

Beyond the original context, Phi-3's rope takes other tables. We run it up to there (see `model/rope.py`),
so a checkpoint made for 128k positions has a context of 4096 here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from trilemma.model.config import DecoderConfig, Dense, Rope
from trilemma.model.families import fields
from trilemma.model.families.llama import LlamaLike
from trilemma.model.families.place import Place, Rows
from trilemma.model.families.translation import attentions
from trilemma.model.rope import read_rope

_OLD_NAMES = {"su", "yarn"}  # what longrope was called in the first releases


class Phi3(LlamaLike):
    """Phi3ForCausalLM."""

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    default_eps: ClassVar[float] = 1e-5
    inner: ClassVar[Mapping[str, str]] = {
        **LlamaLike.inner,
        **{f"attention.{role}": "self_attn.qkv_proj" for role in "qkv"},
        **{f"ffn.{role}": "mlp.gate_up_proj" for role in ("gate", "up")},
    }

    def biases(self, raw: fields.Raw) -> tuple[bool, bool, bool]:
        fields.refuse_unless(raw, "attention_bias", [False])
        return False, False, False

    def windows(self, raw: fields.Raw, layers: int) -> list[int | None]:
        return [fields.optional_int(raw, "sliding_window")] * layers

    def rope(self, raw: fields.Raw, head_dim: int, context: int) -> Rope:
        key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
        found = raw.get(key)
        if isinstance(found, Mapping) and found.get("rope_type", found.get("type")) in _OLD_NAMES:
            raw = {**raw, key: {**found, "rope_type": "longrope", "type": "longrope"}}
        original = fields.positive_int(raw, "original_max_position_embeddings", 4096)
        return read_rope(
            {**raw, "original_max_position_embeddings": original}, head_dim=head_dim, max_context=context,
            kinds=("default", "longrope"), default_share=1.0,
        )  # fmt: skip

    def head_dim(self, raw: fields.Raw, dim: int, heads: int) -> int:
        return super().head_dim({key: value for key, value in raw.items() if key != "head_dim"}, dim, heads)

    def layer_place(self, index: int, part: str, leaf: str, config: DecoderConfig) -> Place:
        whole = super().layer_place(index, part, leaf, config)
        attention, ffn = config.layers[index].attention, config.layers[index].ffn
        if part in ("ffn.gate", "ffn.up") and isinstance(ffn, Dense):
            return Place(whole.name, Rows(ffn.hidden * (part == "ffn.up"), ffn.hidden, 2 * ffn.hidden))
        if part in ("attention.q", "attention.k", "attention.v") and attention is not None:
            q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
            start, block = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}[part[-1]]
            return Place(whole.name, Rows(start, block, q + 2 * kv))
        return whole

    def written_options(self, config: DecoderConfig) -> dict[str, Any]:
        attention = attentions(config)[0]
        parameters = attention.rope.parameters if attention.rope else {}
        options: dict[str, Any] = {
            "sliding_window": attention.window,
            "partial_rotary_factor": parameters.get("partial_rotary_factor", 1.0),
            "pad_token_id": None,  # else transformers takes one that small vocabularies do not have
        }
        if "max_position_embeddings" in parameters:
            options["max_position_embeddings"] = int(parameters["max_position_embeddings"])
            options["original_max_position_embeddings"] = int(parameters["original_max_position_embeddings"])
        return options


PHI3 = Phi3()
