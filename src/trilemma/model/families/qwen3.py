"""Qwen3: Qwen2's layers without biases, and RMS norms over each head's q and k."""

from __future__ import annotations

from typing import Any, ClassVar

from trilemma.model.config import DecoderConfig
from trilemma.model.families import fields
from trilemma.model.families.qwen2 import Qwen2
from trilemma.model.families.translation import attentions


class Qwen3(Qwen2):
    """Qwen3ForCausalLM. An absent `head_dim` means 128 in transformers, whatever the width."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    qk_norm: ClassVar[bool] = True

    def biases(self, raw: fields.Raw) -> tuple[bool, bool, bool]:
        fields.refuse_unless(raw, "mlp_bias", [False])
        attention = fields.flag(raw, "attention_bias", False)
        return attention, attention, False

    def head_dim(self, raw: fields.Raw, dim: int, heads: int) -> int:
        return fields.positive_int(raw, "head_dim", 128)

    def written_options(self, config: DecoderConfig) -> dict[str, Any]:
        return {"attention_bias": attentions(config)[0].qkv_bias, **super().written_options(config)}


QWEN3 = Qwen3()
