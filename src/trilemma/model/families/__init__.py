"""Table of model families, keyed by the `model_type` of config.json: one file and one line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.core.registry import Registry
from trilemma.model.families.family import Family

FAMILIES: Registry[Family] = Registry(
    "family",
    {
        "gemma3": "trilemma.model.families.gemma3:GEMMA3",
        "gemma3_text": "trilemma.model.families.gemma3:GEMMA3_TEXT",
        "gpt2": "trilemma.model.families.gpt2:GPT2",
        "gpt_neox": "trilemma.model.families.gpt_neox:GPT_NEOX",
        "llama": "trilemma.model.families.llama:LLAMA",
        "mistral": "trilemma.model.families.mistral:MISTRAL",
        "mixtral": "trilemma.model.families.mixtral:MIXTRAL",
        "phi3": "trilemma.model.families.phi3:PHI3",
        "qwen2": "trilemma.model.families.qwen2:QWEN2",
        "qwen3": "trilemma.model.families.qwen3:QWEN3",
        "qwen3_moe": "trilemma.model.families.qwen3_moe:QWEN3_MOE",
    },
)


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        CheckpointError: no `model_type`.
        UnsupportedModelError: an architecture that no family lists.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"config.json has no 'model_type'. Expected one of: {', '.join(FAMILIES.names())}. "
            "Add the key, or export the model again with save_pretrained of transformers."
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"Architecture '{model_type}' (model_type in config.json) is not implemented. "
            f"Valid: {', '.join(FAMILIES.names())}. A family is one file in trilemma/model/families."
        )
    return FAMILIES.get(model_type)


__all__ = ["FAMILIES", "Family", "family_of"]
