"""Mistral: Llama's layers without biases, and a sliding window over all of them."""

from __future__ import annotations

from typing import Any

from trilemma.core.errors import UnsupportedModelError
from trilemma.model.config import DecoderConfig
from trilemma.model.families import fields
from trilemma.model.families.llama import LlamaLike
from trilemma.model.families.translation import attentions


class Mistral(LlamaLike):
    """MistralForCausalLM. An absent `sliding_window` means 4096 in transformers; null means none."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"

    def biases(self, raw: fields.Raw) -> tuple[bool, bool, bool]:
        fields.refuse_unless(raw, "attention_bias", [False])
        fields.refuse_unless(raw, "mlp_bias", [False])
        return False, False, False

    def windows(self, raw: fields.Raw, layers: int) -> list[int | None]:
        types = raw.get("layer_types")
        if types is not None and set(types) != {"sliding_attention"}:
            raise UnsupportedModelError(
                f"config.json: 'layer_types' {sorted(set(types))} of mistral; supported: all 'sliding_attention'."
            )
        window = fields.optional_int(raw, "sliding_window") if "sliding_window" in raw else 4096
        return [window] * layers

    def written_options(self, config: DecoderConfig) -> dict[str, Any]:
        return {"sliding_window": attentions(config)[0].window}


MISTRAL = Mistral()
