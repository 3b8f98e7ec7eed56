"""Gemma 3, its text part: sandwich norms stored less 1, q and k norms, scaled embedding, local and global layers.

Five of six layers see a window and rotate by a base of their own; the others see everything. Checkpoints
with a vision tower (`model_type` gemma3) are read for their text and written as text models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.model.config import Attention, DecoderConfig, LayerSpec, Nonlinearity, Rope
from trilemma.model.families import fields
from trilemma.model.families.llama import Ffn, LlamaLike
from trilemma.model.families.place import Place
from trilemma.model.families.translation import attentions
from trilemma.model.rope import read_rope, write_rope

_FULL, _SLIDING = "full_attention", "sliding_attention"
_THETA = {_FULL: 1e6, _SLIDING: 1e4}
_DEFAULTS: dict[str, Any] = {  # those of transformers; published configs leave most keys out
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip


class Gemma3Text(LlamaLike):
    """Gemma3ForCausalLM."""

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    default_tied: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = True
    activation_key: ClassVar[str] = "hidden_activation"
    activations: ClassVar[Mapping[str, Nonlinearity]] = {
        "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu", "relu": "relu",
    }  # fmt: skip
    inner: ClassVar[Mapping[str, str]] = {
        **LlamaLike.inner,
        "attention_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    }

    def read_config(self, raw: Mapping[str, Any]) -> DecoderConfig:
        return super().read_config({**_DEFAULTS, **{key: value for key, value in raw.items() if value is not None}})

    def refuse_options(self, raw: fields.Raw) -> None:
        fields.refuse_unless(raw, "final_logit_softcapping", [])
        fields.refuse_unless(raw, "attn_logit_softcapping", [])
        fields.refuse_unless(raw, "use_bidirectional_attention", [False])

    def biases(self, raw: fields.Raw) -> tuple[bool, bool, bool]:
        attention = fields.flag(raw, "attention_bias", False)
        return attention, attention, False

    def windows(self, raw: fields.Raw, layers: int) -> list[int | None]:
        window = fields.positive_int(raw, "sliding_window")
        return [window if kind == _SLIDING else None for kind in _layer_types(raw, layers)]

    def scale(self, raw: fields.Raw, head_dim: int) -> float:
        return float(fields.positive_float(raw, "query_pre_attn_scalar") ** -0.5)

    def ropes(self, raw: fields.Raw, head_dim: int, context: int, layers: int) -> list[Rope]:
        of_kind = {
            kind: read_rope(found, head_dim=head_dim, max_context=context, default_theta=_THETA[kind])
            for kind, found in _rope_parameters(raw).items()
        }
        return [of_kind[kind] for kind in _layer_types(raw, layers)]

    def layer(self, attention: Attention, ffn: Ffn) -> LayerSpec:
        return LayerSpec(attention=attention, ffn=ffn, post_norms=True)

    def config_options(self, dim: int) -> dict[str, Any]:
        return {"embedding_scale": dim**0.5}

    def place(self, name: str, config: DecoderConfig) -> Place:
        found = super().place(name, config)
        return replace(found, add=1.0) if name.endswith("norm.weight") else found

    def written_options(self, config: DecoderConfig) -> dict[str, Any]:
        specs = attentions(config)
        local = next((spec for spec in specs if spec.window is not None), None)
        wide = next((spec for spec in specs if spec.window is None), None)
        options: dict[str, Any] = {
            "attention_bias": specs[0].qkv_bias,
            "query_pre_attn_scalar": _whole(specs[0].scale ** -2),
            "layer_types": [_FULL if spec.window is None else _SLIDING for spec in specs],
            "rope_scaling": None,
        }
        if local is not None and local.rope is not None:
            options |= {"sliding_window": local.window, "rope_local_base_freq": local.rope.theta}
        return options | (write_rope(wide.rope) if wide is not None and wide.rope else {})


class Gemma3(Gemma3Text):
    """Gemma3ForConditionalGeneration: the text model inside one that sees pictures too."""

    model_type = "gemma3"
    aliases = (
        ("model.", "language_model.model."),
        ("model.", "model.language_model."),
        ("lm_head.", "language_model.lm_head."),
    )

    def read_config(self, raw: Mapping[str, Any]) -> DecoderConfig:
        text = raw.get("text_config")
        if not isinstance(text, Mapping):
            raise CheckpointError("config.json of a gemma3 lacks 'text_config'. Copy that of the original model.")
        fields.refuse_quantized(raw)
        outside = {key: raw[key] for key in ("tie_word_embeddings", "bos_token_id", "eos_token_id") if key in raw}
        return GEMMA3_TEXT.read_config({**outside, **text})

    def is_harmless(self, name: str, config: DecoderConfig) -> bool:
        seeing = ("vision_tower.", "multi_modal_projector.")
        return name.removeprefix("model.").startswith(seeing) or super().is_harmless(name, config)


def _layer_types(raw: fields.Raw, layers: int) -> list[str]:
    found = raw.get("layer_types")
    if found is None:
        pattern = fields.positive_int(raw, "sliding_window_pattern", 6)
        return [_FULL if (index + 1) % pattern == 0 else _SLIDING for index in range(layers)]
    if not isinstance(found, list) or len(found) != layers:
        raise CheckpointError(f"config.json: 'layer_types' must list {layers} layers, one entry each.")
    for kind in found:
        if kind not in (_FULL, _SLIDING):
            raise UnsupportedModelError(
                f"config.json: layer type {kind!r} is not implemented. Supported: '{_FULL}', '{_SLIDING}'."
            )
    return found


def _rope_parameters(raw: fields.Raw) -> dict[str, dict[str, Any]]:
    """What `read_rope` reads, for global and local layers, from the new spelling or the old one."""
    found = raw.get("rope_parameters")
    if isinstance(found, Mapping) and (_FULL in found or _SLIDING in found):
        return {kind: {"rope_parameters": found.get(kind) or {}} for kind in (_FULL, _SLIDING)}
    return {
        _FULL: {"rope_theta": raw.get("rope_theta"), "rope_scaling": found or raw.get("rope_scaling")},
        _SLIDING: {"rope_theta": raw.get("rope_local_base_freq")},
    }


def _whole(value: float) -> int | float:
    """transformers wants an integer where it is one."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


GEMMA3_TEXT = Gemma3Text()
GEMMA3 = Gemma3()
