"""What a decoder-only transformer is, as data.

A DecoderConfig is a list of LayerSpec records, so that no two layers need be alike after pruning.
The torch reference, the native engine and the cost arithmetic all read this one schema; families
(`model/families/`) translate Hugging Face configs into it.

Canonical tensor names (shapes are (out, in); biases are (out,)):
    embedding.weight (vocab, dim)             head.weight (vocab, dim; absent when tied)
    final_norm.weight (dim,)
    layers.{i}.attention_norm.weight          layers.{i}.ffn_norm.weight
    layers.{i}.attention.{q,k,v,o}.weight     layers.{i}.attention.{q,k,v,o}.bias
    layers.{i}.ffn.{gate,up,down}.weight      layers.{i}.ffn.{gate,up,down}.bias
A layer with `attention=None` or `ffn=None` has none of that part's tensors, norm included.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trilemma.core.record import Record


class Rope(Record):
    """Rotary position embedding, rotate-half convention (Hugging Face order of dimensions).

    `inverse_frequencies` (rotary_dim/2,) already contain the scaling in use; `attention_factor`
    multiplies cos and sin (yarn). `kind` and `theta` are kept for export.
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn", "dynamic"] = "default"
    parameters: dict[str, float] = Field(default_factory=dict)
    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0


class Attention(Record):
    """Multi-head, grouped-query or multi-query attention. `scale` multiplies q.k.

    With a `window`, a query sees the last `window` positions, its own included.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    scale: float
    window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False


class Dense(Record):
    """A feed-forward block: gated (down(act(gate x) * up x)) or plain (down(act(up x)))."""

    hidden: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    bias: bool = False


class LayerSpec(Record):
    """One pre-norm residual layer."""

    attention: Attention | None
    ffn: Dense | None


class DecoderConfig(Record):
    """A decoder-only transformer with RMS norms. `family` names the file in `families/`."""

    family: str
    dim: int
    vocab_size: int
    max_context: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    tied: bool
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor of the model, in file order."""
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, self.dim)}
        for index, layer in enumerate(self.layers):
            if layer.attention is not None:
                shapes |= _attention_shapes(f"layers.{index}", layer.attention, self.dim)
            if layer.ffn is not None:
                shapes |= _ffn_shapes(f"layers.{index}", layer.ffn, self.dim)
        shapes["final_norm.weight"] = (self.dim,)
        if not self.tied:
            shapes["head.weight"] = (self.vocab_size, self.dim)
        return shapes

    def linear_names(self) -> list[str]:
        """Names of the matrices inside layers (not embedding, not head), in order of execution."""
        return [name for name, shape in self.tensor_shapes().items() if len(shape) == 2 and name.startswith("layers.")]


def _attention_shapes(prefix: str, spec: Attention, dim: int) -> dict[str, tuple[int, ...]]:
    q_dim, kv_dim = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.attention_norm.weight": (dim,)}
    for role, rows in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
        shapes[f"{prefix}.attention.{role}.weight"] = (rows, dim)
        if spec.qkv_bias:
            shapes[f"{prefix}.attention.{role}.bias"] = (rows,)
    shapes[f"{prefix}.attention.o.weight"] = (dim, q_dim)
    if spec.o_bias:
        shapes[f"{prefix}.attention.o.bias"] = (dim,)
    return shapes


def _ffn_shapes(prefix: str, spec: Dense, dim: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.ffn_norm.weight": (dim,)}
    for role in ("gate", "up") if spec.gated else ("up",):
        shapes[f"{prefix}.ffn.{role}.weight"] = (spec.hidden, dim)
        if spec.bias:
            shapes[f"{prefix}.ffn.{role}.bias"] = (spec.hidden,)
    shapes[f"{prefix}.ffn.down.weight"] = (dim, spec.hidden)
    if spec.bias:
        shapes[f"{prefix}.ffn.down.bias"] = (dim,)
    return shapes
