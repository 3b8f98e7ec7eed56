"""The torch module of every DecoderConfig: reference, calibration and training.

Submodules are named so that `state_dict` keys are the canonical tensor names. Layers can be built
one by one from a Model (`layer_from_model`), so that calibration holds one of them at a time.
Speed is not its aim; the native engine is for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trilemma.core.errors import CheckpointError
from trilemma.model.config import Attention, DecoderConfig, Dense, LayerSpec, Rope
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.model.plain import PlainDtype, PlainMatrix, f32_to_bf16
from trilemma.model.sources import MemorySource


class KvSlot(Protocol):
    """The keys and values of one layer; `append` returns all of them, the new ones last."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


class RmsNorm(nn.Module):
    """x / rms(x) * weight, in f32 whatever the input's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class AttentionBlock(nn.Module):
    """Grouped-query attention with rotary embedding, causal, perhaps within a window."""

    def __init__(self, spec: Attention, dim: int) -> None:
        super().__init__()
        self.spec = spec
        q_dim, kv_dim = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q = nn.Linear(dim, q_dim, bias=spec.qkv_bias)
        self.k = nn.Linear(dim, kv_dim, bias=spec.qkv_bias)
        self.v = nn.Linear(dim, kv_dim, bias=spec.qkv_bias)
        self.o = nn.Linear(q_dim, dim, bias=spec.o_bias)

    def forward(self, x: Tensor, positions: Tensor, slot: KvSlot | None = None) -> Tensor:
        batch, time, _ = x.shape
        spec = self.spec
        q = self.q(x).view(batch, time, spec.heads, spec.head_dim).transpose(1, 2)  # (batch, heads, time, head_dim)
        k = self.k(x).view(batch, time, spec.kv_heads, spec.head_dim).transpose(1, 2)
        v = self.v(x).view(batch, time, spec.kv_heads, spec.head_dim).transpose(1, 2)
        if spec.rope is not None:
            cos, sin = rotary_tables(spec.rope, positions)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if slot is not None:
            k, v = slot.append(k, v)
        out = attend(q, k, v, spec)  # (batch, heads, time, head_dim)
        mixed: Tensor = self.o(out.transpose(1, 2).reshape(batch, time, -1))
        return mixed


class FeedForward(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) without a gate."""

    def __init__(self, spec: Dense, dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.gate = nn.Linear(dim, spec.hidden, bias=spec.bias) if spec.gated else None
        self.up = nn.Linear(dim, spec.hidden, bias=spec.bias)
        self.down = nn.Linear(spec.hidden, dim, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            hidden = activate(self.up(x), self.spec.activation)
        else:
            hidden = activate(self.gate(x), self.spec.activation) * self.up(x)
        out: Tensor = self.down(hidden)
        return out


class DecoderLayer(nn.Module):
    """One pre-norm residual layer; either part may be absent."""

    def __init__(self, spec: LayerSpec, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.attention_norm = RmsNorm(dim, norm_eps) if spec.attention else None
        self.attention = AttentionBlock(spec.attention, dim) if spec.attention else None
        self.ffn_norm = RmsNorm(dim, norm_eps) if spec.ffn else None
        self.ffn = FeedForward(spec.ffn, dim) if spec.ffn else None

    def forward(self, x: Tensor, positions: Tensor | None = None, slot: KvSlot | None = None) -> Tensor:
        """x (batch, time, dim) to the same shape; `positions` (time,), 0.. when not given."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        if self.attention is not None and self.attention_norm is not None:
            x = x + self.attention(self.attention_norm(x), positions, slot)
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x


class Decoder(nn.Module):
    """A whole model. With `gradient_checkpointing`, training keeps one activation a layer."""

    def __init__(self, config: DecoderConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(spec, config.dim, config.norm_eps) for spec in config.layers)
        self.final_norm = RmsNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)

    @classmethod
    def from_model(
        cls,
        model: Model,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        gradient_checkpointing: bool = False,
    ) -> Decoder:
        """All tensors of a model, dequantized, in `dtype`. Raises CheckpointError as `Model.tensor` does."""
        with torch.device("meta"):
            decoder = cls(model.config, gradient_checkpointing=gradient_checkpointing)
        _assign(decoder, model, "", dtype, device)
        return decoder

    def forward(
        self, tokens: Tensor, *, start: int = 0, slots: list[KvSlot] | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits (batch, time, vocab) of tokens (batch, time); `start` is the first one's position.

        With `slots` (one a layer) earlier keys and values are attended to; `last_only` computes
        the last position's logits alone, (batch, 1, vocab).
        """
        x = self.hidden(tokens, start=start, slots=slots)
        return self.logits(x[:, -1:] if last_only else x)

    def hidden(self, tokens: Tensor, *, start: int = 0, slots: list[KvSlot] | None = None) -> Tensor:
        """The last layer's output (batch, time, dim), before the final norm."""
        x: Tensor = self.embedding(tokens)
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        for index, layer in enumerate(self.layers):
            slot = None if slots is None else slots[index]
            if self.gradient_checkpointing and self.training and slot is None:
                x = checkpoint(layer, x, positions, use_reentrant=False)
            else:
                x = layer(x, positions, slot)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Logits of hidden states (..., dim)."""
        normed = self.final_norm(x)
        out: Tensor = F.linear(normed, self.embedding.weight) if self.head is None else self.head(normed)
        return out

    def initialize(self, seed: int = 0, std: float = 0.02) -> None:
        """Fresh weights for pretraining: normal, those that write to the residual scaled down by depth (GPT-2)."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        depth = max(1, 2 * len(self.layers)) ** -0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.fill_(1.0)
                elif name.endswith(".bias"):
                    parameter.zero_()
                else:
                    scale = std * depth if name.endswith((".o.weight", ".down.weight")) else std
                    values = torch.empty(parameter.shape).normal_(0.0, scale, generator=generator)
                    parameter.copy_(values)


def layer_from_model(
    model: Model, index: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> DecoderLayer:
    """Layer `index` alone, with its tensors; reads nothing else of the model."""
    with torch.device("meta"):
        layer = DecoderLayer(model.config.layers[index], model.config.dim, model.config.norm_eps)
    _assign(layer, model, f"layers.{index}.", dtype, device)
    return layer


def decoder_to_model(decoder: Decoder, dtype: PlainDtype = "f32") -> Model:
    """The decoder's weights as a Model, its matrices in `dtype`; copies, so that training may go on."""
    tensors: dict[str, Float32 | StoredMatrix] = {}
    for name, values in canonical_tensors(decoder):
        if values.ndim == 1 or dtype == "f32":
            tensors[name] = values
        else:
            tensors[name] = PlainMatrix(dtype, f32_to_bf16(values) if dtype == "bf16" else values.astype(np.float16))
    return Model(decoder.config, MemorySource(tensors, dtype))


def canonical_tensors(decoder: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Canonical name and a f32 copy of every tensor, in file order."""
    state: Mapping[str, Tensor] = decoder.state_dict()
    for name in decoder.config.tensor_shapes():
        yield name, state[name].detach().to("cpu", torch.float32).numpy().copy()


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
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _assign(module: nn.Module, model: Model, prefix: str, dtype: torch.dtype, device: str | torch.device) -> None:
    """Put the model's tensors in place of the module's empty (meta) parameters, one at a time."""
    for name, _ in list(module.named_parameters()):
        values = model.tensor(prefix + name)
        if not np.isfinite(values).all():
            raise CheckpointError(f"Tensor '{prefix + name}' has NaN or infinite values; fetch the checkpoint again.")
        tensor = torch.from_numpy(np.array(values, dtype=np.float32, order="C")).to(device=device, dtype=dtype)
        owner_name, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner_name), leaf, nn.Parameter(tensor))
