"""Small random models of every family: which options are tried, shared by the tests that need such checkpoints."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "vocab_size": 113, "hidden_size": 40, "intermediate_size": 76, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {"vocab_size": 113, "n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": 64, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_NEOX = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]
_LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0], "long_factor": [1.0, 2.0, 3.0, 5.0, 9.0]}
_QWEN_MOE = {**BASE, "head_dim": 12, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 27}
_MIXTRAL = {**BASE, "num_local_experts": 5, "num_experts_per_tok": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {**BASE, "head_dim": 14}),
    "qwen3 tied, biases, one kv head": (
        "Qwen3", {**BASE, "head_dim": 8, "tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1},
    ),
    "qwen3 window in upper layers, yarn": (
        "Qwen3",
        {**BASE, "head_dim": 16, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1,
         "rope_scaling": _YARN},
    ),
    "gemma3": (
        "Gemma3Text", {**BASE, "head_dim": 12, "sliding_window": 9, "layer_types": _LOCAL, "query_pre_attn_scalar": 37},
    ),
    "gemma3 untied, biases, linear rope": (
        "Gemma3Text",
        {**BASE, "head_dim": 8, "sliding_window": 5, "num_hidden_layers": 7, "attention_bias": True,
         "tie_word_embeddings": False, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "phi3": ("Phi3", BASE),
    "phi3 window, all heads": ("Phi3", {**BASE, "sliding_window": 9, "num_key_value_heads": 4}),
    "phi3 long rope": (
        "Phi3", {**BASE, "max_position_embeddings": 640, "original_max_position_embeddings": 48, "rope_scaling": _LONG},
    ),
    "phi3 long rope, partial, tied": (
        "Phi3",
        {**BASE, "num_attention_heads": 2, "tie_word_embeddings": True, "partial_rotary_factor": 0.5,
         "max_position_embeddings": 640, "original_max_position_embeddings": 48, "rope_scaling": _LONG},
    ),
    "gpt2": ("GPT2", _GPT2),
    "gpt2 untied, scaled by depth": (
        "GPT2",
        {**_GPT2, "n_inner": 52, "tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True,
         "activation_function": "relu"},
    ),
    "gpt2 unscaled": ("GPT2", {**_GPT2, "scale_attn_weights": False}),
    "gpt_neox": ("GPTNeoX", {**_NEOX, "rotary_pct": 0.4}),
    "gpt_neox serial, no attention bias, tied": (
        "GPTNeoX",
        {**_NEOX, "use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0, "rotary_emb_base": 5000,
         "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    ),
    "gpt_neox linear rope": (
        "GPTNeoX", {**_NEOX, "rotary_pct": 0.6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "mixtral": ("Mixtral", _MIXTRAL),
    "mixtral window, tied, one expert": (
        "Mixtral", {**_MIXTRAL, "num_experts_per_tok": 1, "sliding_window": 9, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("Qwen3Moe", _QWEN_MOE),
    "qwen3_moe normalized, dense layers": (
        "Qwen3Moe", {**_QWEN_MOE, "norm_topk_prob": True, "mlp_only_layers": [1], "num_experts_per_tok": 3},
    ),
    "qwen3_moe every second layer, window": (
        "Qwen3Moe", {**_QWEN_MOE, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 9},
    ),
}  # fmt: skip
