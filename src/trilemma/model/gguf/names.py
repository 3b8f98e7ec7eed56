"""GGUF's names of the canonical tensors."""

from __future__ import annotations

import re

_ROLES = {
    "attention_norm": "attn_norm", "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v",
    "attention.o": "attn_output", "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm", "ffn.gate": "ffn_gate", "ffn.up": "ffn_up", "ffn.down": "ffn_down",
    "ffn.router": "ffn_gate_inp",
}  # fmt: skip
_ENDS = {
    "embedding.weight": "token_embd.weight",
    "final_norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}
_EXPERT = re.compile(r"ffn\.experts\.\d+\.(gate|up|down)")
_SHARED = re.compile(r"ffn\.shared\.(gate|up|down)")


def gguf_name(name: str) -> str:
    """GGUF's name of a canonical tensor name; all experts of a layer share one tensor there."""
    if name in _ENDS:
        return _ENDS[name]
    _, layer, rest = name.split(".", 2)
    role, _, leaf = rest.rpartition(".")
    if match := _EXPERT.fullmatch(role):
        return f"blk.{layer}.ffn_{match[1]}_exps.{leaf}"
    if match := _SHARED.fullmatch(role):
        return f"blk.{layer}.ffn_{match[1]}_shexp.{leaf}"
    return f"blk.{layer}.{_ROLES[role]}.{leaf}"


def rope_rows_needed(architecture: str, name: str) -> bool:
    """Whether llama.cpp keeps the rows of this tensor in another order: q and k of 'llama', weights and biases."""
    return architecture == "llama" and ".attention." in name and name.split(".")[3] in ("q", "k")
