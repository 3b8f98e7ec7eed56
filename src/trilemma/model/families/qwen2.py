"""Qwen2 and Qwen2.5: Llama's layers with biases on q, k and v, and perhaps a window in the upper ones."""

from __future__ import annotations

from typing import Any

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.model.config import DecoderConfig
from trilemma.model.families import fields
from trilemma.model.families.llama import LlamaLike

_FULL, _SLIDING = "full_attention", "sliding_attention"


class Qwen2(LlamaLike):
    """Qwen2ForCausalLM. `sliding_window` counts only with `use_sliding_window`, from `max_window_layers` up."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"

    def biases(self, raw: fields.Raw) -> tuple[bool, bool, bool]:
        fields.refuse_unless(raw, "attention_bias", [True])
        fields.refuse_unless(raw, "mlp_bias", [False])
        return True, False, False

    def windows(self, raw: fields.Raw, layers: int) -> list[int | None]:
        use = fields.flag(raw, "use_sliding_window", False)
        window = fields.positive_int(raw, "sliding_window", 4096) if use and _has_window(raw) else None
        types = raw.get("layer_types")
        if types is None:
            first = raw.get("max_window_layers", 28)
            if isinstance(first, bool) or not isinstance(first, int) or first < 0:
                raise CheckpointError(f"config.json: 'max_window_layers' is {first!r}; expected a number of layers.")
            types = [_SLIDING if window is not None and index >= first else _FULL for index in range(layers)]
        return [self._window(kind, window) for kind in _checked(types, layers)]

    def _window(self, kind: str, window: int | None) -> int | None:
        if kind == _FULL:
            return None
        if window is None:
            raise CheckpointError(
                "config.json: 'layer_types' has 'sliding_attention', but 'use_sliding_window' is false "
                "or 'sliding_window' is null."
            )
        return window

    def written_options(self, config: DecoderConfig) -> dict[str, Any]:
        windows = [layer.attention.window if layer.attention else None for layer in config.layers]
        used = next((window for window in windows if window is not None), None)
        return {
            "use_sliding_window": used is not None,
            "sliding_window": used,
            "max_window_layers": windows.index(used) if used is not None else len(windows),
            "layer_types": [_FULL if window is None else _SLIDING for window in windows],
        }


def _has_window(raw: fields.Raw) -> bool:
    return "sliding_window" not in raw or raw["sliding_window"] is not None


def _checked(types: Any, layers: int) -> list[str]:
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(f"config.json: 'layer_types' must list {layers} layers, one entry each.")
    for kind in types:
        if kind not in (_FULL, _SLIDING):
            raise UnsupportedModelError(
                f"config.json: layer type {kind!r} is not implemented. Supported: '{_FULL}', '{_SLIDING}'."
            )
    return types


QWEN2 = Qwen2()
