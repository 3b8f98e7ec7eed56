"""The torch modules that a decoder is built of: norms, attention, feed-forward blocks, experts, the residual layer.

Submodules are named so that `state_dict` keys are the canonical tensor names (see `config.py`).
Building, loading and running a whole model is `decoder.py`'s part.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from trilemma.model.config import Attention, DecoderConfig, Dense, Experts, LayerSpec, Rope


class KvSlot(Protocol):
    """The keys and values of one layer; `append` returns all of them, the new ones last."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


class RmsNorm(nn.Module):
    """x / rms(x) * weight (+ bias), in f32 whatever the input's dtype."""

    def __init__(self, dim: int, eps: float, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = self.centred(x.float())
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        out = self.weight * wide.to(x.dtype)
        return out if self.bias is None else out + self.bias

    def centred(self, wide: Tensor) -> Tensor:
        return wide


class LayerNorm(RmsNorm):
    """The same after the mean was subtracted."""

    def centred(self, wide: Tensor) -> Tensor:
        return wide - wide.mean(-1, keepdim=True)


class LowRank(nn.Module):
    """b (a x): what is added to the product of a matrix that it stands beside."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.a = nn.Linear(linear.in_features, rank, bias=False)
        self.b = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


class Products(nn.Module):
    """A block of matrices, each perhaps with a low-rank pair beside it."""

    def add_low_ranks(self, rank: int) -> None:
        """Put a pair of that rank beside each matrix that is there, as `<name>_low_rank`; of rank 0 none."""
        for name, linear in list(self.named_children()):
            if rank and isinstance(linear, nn.Linear):
                self.add_module(f"{name}_low_rank", LowRank(linear, rank))

    def product(self, name: str, x: Tensor) -> Tensor:
        """What matrix `name` makes of x (..., in), and its pair adds: (..., out)."""
        out: Tensor = getattr(self, name)(x)
        pair: LowRank | None = getattr(self, f"{name}_low_rank", None)
        return out if pair is None else out + pair(x)


class AttentionBlock(Products):
    """Grouped-query attention with rotary embedding, causal, perhaps within a window."""

    def __init__(self, spec: Attention, dim: int, norm_eps: float, low_rank: int = 0) -> None:
        super().__init__()
        self.spec = spec
        q_dim, kv_dim = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q = nn.Linear(dim, q_dim, bias=spec.qkv_bias)
        self.k = nn.Linear(dim, kv_dim, bias=spec.qkv_bias)
        self.v = nn.Linear(dim, kv_dim, bias=spec.qkv_bias)
        self.q_norm = RmsNorm(spec.head_dim, norm_eps) if spec.qk_norm else None
        self.k_norm = RmsNorm(spec.head_dim, norm_eps) if spec.qk_norm else None
        self.o = nn.Linear(q_dim, dim, bias=spec.o_bias)
        self.add_low_ranks(low_rank)

    def forward(self, x: Tensor, positions: Tensor, slot: KvSlot | None = None) -> Tensor:
        batch, time, _ = x.shape
        spec = self.spec
        # (batch, heads, time, head_dim)
        q = self.product("q", x).view(batch, time, spec.heads, spec.head_dim).transpose(1, 2)
        k = self.product("k", x).view(batch, time, spec.kv_heads, spec.head_dim).transpose(1, 2)
        v = self.product("v", x).view(batch, time, spec.kv_heads, spec.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.rope is not None:
            cos, sin = rotary_tables(spec.rope, positions)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if slot is not None:
            k, v = slot.append(k, v)
        out = attend(q, k, v, spec)  # (batch, heads, time, head_dim)
        return self.product("o", out.transpose(1, 2).reshape(batch, time, -1))


class FeedForward(Products):
    """down(act(gate x) * up x), or down(act(up x)) without a gate."""

    def __init__(self, spec: Dense, dim: int, low_rank: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.gate = nn.Linear(dim, spec.hidden, bias=spec.bias) if spec.gated else None
        self.up = nn.Linear(dim, spec.hidden, bias=spec.bias)
        self.down = nn.Linear(spec.hidden, dim, bias=spec.bias or spec.down_bias)
        self.add_low_ranks(low_rank)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            hidden = activate(self.product("up", x), self.spec.activation)
        else:
            hidden = activate(self.product("gate", x), self.spec.activation) * self.product("up", x)
        return self.product("down", hidden)


class Bias(nn.Module):
    """A vector that is added: the bias that all experts of a block share."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class ExpertBlock(nn.Module):
    """Some of many feed-forward blocks, chosen for every token by a router; see `config.Experts`."""

    def __init__(self, spec: Experts, dim: int, low_rank: int = 0) -> None:
        super().__init__()
        self.spec = spec
        dense = Dense(hidden=spec.hidden, activation=spec.activation)
        shared = Dense(hidden=spec.shared_hidden, activation=spec.activation)
        self.router = nn.Linear(dim, spec.router_rows, bias=False)
        self.shared = FeedForward(shared, dim, low_rank) if spec.shared_hidden else None
        self.experts = nn.ModuleList(FeedForward(dense, dim, low_rank) for _ in range(spec.count))
        self.down = Bias(dim) if spec.down_bias else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, dim)
        chosen, gates = self.route(flat)
        out = torch.zeros_like(flat) if self.shared is None else self.shared(flat)
        for index, expert in enumerate(self.experts):
            tokens, place = (chosen == index).nonzero(as_tuple=True)
            if len(tokens):  # an expert that nobody chose does not run, and its hooks see nothing
                out = out.index_add(0, tokens, expert(flat[tokens]) * gates[tokens, place, None])
        if self.down is not None:
            out = self.down(out)
        return out.reshape(x.shape)

    def route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens (n, dim): the chosen experts (n, active), best first, and what their outputs are multiplied by."""
        spec = self.spec
        scores = self.router(flat).float()
        if spec.router == "glu":
            gate, up = scores.split(spec.count, dim=-1)
            scores = (activate(gate, spec.activation) * up).abs()
        # a stable sort, because topk says nothing about ties
        best, chosen = (part[:, : spec.active] for part in scores.sort(dim=-1, descending=True, stable=True))
        if spec.gates == "one":
            gates = torch.ones_like(best)
        elif spec.gates == "normalized":
            gates = best.softmax(-1)
        else:
            gates = scores.softmax(-1).gather(1, chosen)
        return chosen, gates.to(flat.dtype)


class DecoderLayer(nn.Module):
    """One residual layer; either part may be absent."""

    def __init__(self, spec: LayerSpec, config: DecoderConfig) -> None:
        super().__init__()
        self.spec = spec
        attention, ffn, post, rank = spec.attention, spec.ffn, spec.post_norms, spec.low_rank
        self.attention_norm = make_norm(config) if attention else None
        self.attention = AttentionBlock(attention, config.dim, config.norm_eps, rank) if attention else None
        self.attention_post_norm = make_norm(config) if attention and post else None
        self.ffn_norm = make_norm(config) if ffn else None
        self.ffn = make_ffn(ffn, config.dim, rank) if ffn else None
        self.ffn_post_norm = make_norm(config) if ffn and post else None

    def forward(self, x: Tensor, positions: Tensor | None = None, slot: KvSlot | None = None) -> Tensor:
        """x (batch, time, dim) to the same shape; `positions` (time,), 0.. when not given."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        entering = x
        if self.attention is not None and self.attention_norm is not None:
            mixed = self.attention(self.attention_norm(x), positions, slot)
            x = x + (mixed if self.attention_post_norm is None else self.attention_post_norm(mixed))
        if self.ffn is not None and self.ffn_norm is not None:
            out = self.ffn(self.ffn_norm(entering if self.spec.parallel else x))
            x = x + (out if self.ffn_post_norm is None else self.ffn_post_norm(out))
        return x


def make_norm(config: DecoderConfig) -> RmsNorm:
    """A norm of the residual stream, of the kind that the config says."""
    kind = LayerNorm if config.norm == "layer" else RmsNorm
    return kind(config.dim, config.norm_eps, bias=config.norm_bias)


def make_ffn(spec: Dense | Experts, dim: int, low_rank: int = 0) -> FeedForward | ExpertBlock:
    """The feed-forward module of a layer: (batch, time, dim) in and out."""
    return FeedForward(spec, dim, low_rank) if isinstance(spec, Dense) else ExpertBlock(spec, dim, low_rank)


def rotary_tables(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (time, rotary_dim / 2) in f32, attention factor included."""
    table = torch.tensor(rope.inverse_frequencies, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * table
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim dimensions of x (batch, heads, time, head_dim), rotate-half convention."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def attend(q: Tensor, k: Tensor, v: Tensor, spec: Attention) -> Tensor:
    """Causal attention of the last positions: q (batch, heads, time, d), k and v (batch, kv_heads, total, d).

    A query sees itself and what lies before it; with a window, the last `window` positions, itself included.
    """
    time, total = q.shape[2], k.shape[2]
    grouped = spec.heads != spec.kv_heads
    if time == total and (spec.window is None or spec.window >= total):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=grouped)
    query = torch.arange(total - time, total, device=q.device)[:, None]
    key = torch.arange(total, device=q.device)[None, :]
    seen = key <= query
    if spec.window is not None:
        seen &= key > query - spec.window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=spec.scale, enable_gqa=grouped)


def activate(x: Tensor, name: str) -> Tensor:
    """silu, relu, gelu (by erf) or gelu_tanh, elementwise; the shape stays."""
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
