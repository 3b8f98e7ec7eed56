"""Mixtral: Mistral's attention, and experts in every layer of which two run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from trilemma.model.config import DecoderConfig, Experts
from trilemma.model.families import fields
from trilemma.model.families.experts import read_experts
from trilemma.model.families.llama import Ffn, LlamaLike
from trilemma.model.families.translation import attentions

_ROLES = {"gate": "w1", "down": "w2", "up": "w3"}


class Mixtral(LlamaLike):
    """MixtralForCausalLM."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    default_eps: ClassVar[float] = 1e-5
    default_theta: ClassVar[float] = 1e6
    inner: ClassVar[Mapping[str, str]] = {
        **LlamaLike.inner,
        "ffn.router": "block_sparse_moe.gate",
        **{f"ffn.experts.{{}}.{ours}": f"block_sparse_moe.experts.{{}}.{theirs}" for ours, theirs in _ROLES.items()},
    }

    def biases(self, raw: fields.Raw) -> tuple[bool, bool, bool]:
        fields.refuse_unless(raw, "attention_bias", [False])
        return False, False, False

    def windows(self, raw: fields.Raw, layers: int) -> list[int | None]:
        return [fields.optional_int(raw, "sliding_window")] * layers

    def ffns(self, raw: fields.Raw, layers: int) -> list[Ffn]:
        self.activation(raw)  # refuses all but SiLU
        found = read_experts(raw, ("num_local_experts", "num_experts"), "intermediate_size", normalized=True)
        return [found] * layers

    def written_options(self, config: DecoderConfig) -> dict[str, Any]:
        ffn = config.layers[0].ffn
        if not isinstance(ffn, Experts):
            raise self._cannot_write("layer 0 has no experts")
        return {
            "sliding_window": attentions(config)[0].window,
            "intermediate_size": ffn.hidden,
            "num_local_experts": ffn.count,
            "num_experts_per_tok": ffn.active,
        }


MIXTRAL = Mixtral()
