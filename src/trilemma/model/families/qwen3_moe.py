"""Qwen3-MoE: Qwen3's attention, and experts in all layers or in some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from trilemma.core.errors import CheckpointError
from trilemma.model.config import DecoderConfig, Dense, Experts
from trilemma.model.families import fields
from trilemma.model.families.experts import read_experts
from trilemma.model.families.llama import Ffn
from trilemma.model.families.qwen3 import Qwen3
from trilemma.model.families.translation import attentions

_ROLES = ("gate", "up", "down")


class Qwen3Moe(Qwen3):
    """Qwen3MoeForCausalLM. A window in use holds in all layers; an absent `head_dim` is dim / heads here."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    inner: ClassVar[Mapping[str, str]] = {
        **Qwen3.inner,
        "ffn.router": "mlp.gate",
        **{f"ffn.experts.{{}}.{role}": f"mlp.experts.{{}}.{role}_proj" for role in _ROLES},
    }

    def refuse_options(self, raw: fields.Raw) -> None:
        fields.refuse_unless(raw, "shared_expert_intermediate_size", [0])

    def head_dim(self, raw: fields.Raw, dim: int, heads: int) -> int:
        return super(Qwen3, self).head_dim(raw, dim, heads)

    def windows(self, raw: fields.Raw, layers: int) -> list[int | None]:
        used = fields.flag(raw, "use_sliding_window", False)
        window = fields.optional_int(raw, "sliding_window") if "sliding_window" in raw else 4096
        return [window if used else None] * layers

    def ffns(self, raw: fields.Raw, layers: int) -> list[Ffn]:
        normalized = fields.flag(raw, "norm_topk_prob", False)
        experts = read_experts(
            raw, ("num_experts", "num_local_experts"), "moe_intermediate_size", normalized=normalized
        )
        step = fields.positive_int(raw, "decoder_sparse_step", 1)
        dense_layers = _indices(raw, layers)
        sparse = [index not in dense_layers and (index + 1) % step == 0 for index in range(layers)]
        activation = self.activation(raw)
        if all(sparse):
            return [experts] * layers
        dense = Dense(hidden=fields.positive_int(raw, "intermediate_size"), activation=activation)
        return [experts if here else dense for here in sparse]

    def written_options(self, config: DecoderConfig) -> dict[str, Any]:
        experts = [layer.ffn for layer in config.layers if isinstance(layer.ffn, Experts)]
        if not experts:
            raise self._cannot_write("no layer has experts")
        attention = attentions(config)[0]
        return {
            "attention_bias": attention.qkv_bias,
            "use_sliding_window": attention.window is not None,
            "sliding_window": attention.window,
            "num_experts": experts[0].count,
            "num_experts_per_tok": experts[0].active,
            "moe_intermediate_size": experts[0].hidden,
            "norm_topk_prob": experts[0].gates == "normalized",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, layer in enumerate(config.layers) if isinstance(layer.ffn, Dense)],
        }


def _indices(raw: fields.Raw, layers: int) -> set[int]:
    found = raw.get("mlp_only_layers") or []
    if not isinstance(found, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in found):
        raise CheckpointError(f"config.json: 'mlp_only_layers' is {found!r}; expected a list of layer numbers.")
    return {index for index in found if 0 <= index < layers}


QWEN3_MOE = Qwen3Moe()
