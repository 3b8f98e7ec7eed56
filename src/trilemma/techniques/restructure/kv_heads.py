"""Fewer key-value heads by pooling: keys and values of heads that are merged become their mean.

Mean pooling is Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023
(arXiv:2305.13245), who train for 5% of pre-training afterwards; here a `heal` step may follow. Two things
happen before the mean, both without changing the model's function:

- similar heads are brought together, with their query heads;
- heads are turned towards each other (Jin et al., "Align Attention Heads Before Merging Them", 2024,
  arXiv:2412.20677): values by any rotation, undone in the output matrix; keys plane by plane, as rotary
  embeddings allow, undone in the queries. How near heads come is measured on calibration text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trilemma.core.errors import RecipeError
from trilemma.model.config import Attention, DecoderConfig, LayerSpec
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.techniques.calibration import Gram, walk_layers
from trilemma.techniques.prune.cut import with_layer
from trilemma.techniques.stored import refuse_packed, store_like
from trilemma.techniques.technique import Build, TechniqueSettings, report


class KvHeadsSettings(TechniqueSettings):
    """Settings of `kv-heads`."""

    heads: int = Field(ge=1, description="key-value heads that each layer has afterwards; must divide those it has")
    group: Literal["similar", "adjacent"] = Field(
        "similar", description="which heads are merged: similar or adjacent ones"
    )
    align: bool = Field(True, description="turn heads towards each other before the mean; needs calibration text")


class KvHeads:
    """Pool key-value heads."""

    name: ClassVar[str] = "kv-heads"
    what: ClassVar[str] = "merge key-value heads into fewer: a smaller KV cache; heal or distill afterwards"
    Settings: ClassVar[type[KvHeadsSettings]] = KvHeadsSettings

    def supports(self, config: DecoderConfig) -> str | None:
        if all(layer.attention is None or layer.attention.kv_heads == 1 for layer in config.layers):
            return "no layer has more than one key-value head"
        return None

    def needs_calibration(self, settings: KvHeadsSettings) -> bool:
        return settings.align or settings.group == "similar"

    def config_after(self, config: DecoderConfig, settings: KvHeadsSettings) -> DecoderConfig:
        """Raises RecipeError when a layer's heads can not be merged into so many."""
        layers = tuple(_pooled(index, layer, settings.heads) for index, layer in enumerate(config.layers))
        return config.model_copy(update={"layers": layers})

    def exact(self, settings: KvHeadsSettings) -> bool:
        return True

    def apply(self, model: Model, settings: KvHeadsSettings, build: Build) -> Model:
        """Raises RecipeError for packed matrices, or a number of heads that does not divide a layer's."""
        refuse_packed(model, self.name, f"kvheads{settings.heads}+W4A8-g32-gptq")
        self.config_after(model.config, settings)
        if self.needs_calibration(settings):

            def change(model: Model, index: int, grams: Mapping[str, Gram]) -> Model:
                gram = grams.get(f"layers.{index}.attention.k.weight")
                return pool_layer(model, index, settings, None if gram is None else gram.matrix)

            return walk_layers(model, build, [change], roles={"q", "k", "v"}, what="merging heads")
        for index in range(len(model.config.layers)):
            report(build, index, len(model.config.layers), f"layer {index}: merging heads")
            model = pool_layer(model, index, settings, None)
        return model


def _pooled(index: int, layer: LayerSpec, heads: int) -> LayerSpec:
    spec = layer.attention
    if spec is None or spec.kv_heads == heads:
        return layer
    if spec.kv_heads % heads:
        fits = [n for n in range(1, spec.kv_heads + 1) if spec.kv_heads % n == 0]
        raise RecipeError(
            f"Layer {index} has {spec.kv_heads} key-value heads; they can not be merged into {heads}. "
            f"Possible: {', '.join(map(str, fits))}."
        )
    return layer.model_copy(update={"attention": spec.model_copy(update={"kv_heads": heads})})


def pool_layer(model: Model, index: int, settings: KvHeadsSettings, gram: Tensor | None) -> Model:
    """Layer `index` with `settings.heads` key-value heads.

    Args:
        gram: X^T X (dim, dim) of what enters q, k and v; needed to align heads or to find similar ones.
    """
    layer = model.config.layers[index]
    spec = layer.attention
    if spec is None or spec.kv_heads == settings.heads:
        return model
    heads = _Heads.read(model, index, spec)
    merged = spec.kv_heads // settings.heads
    order = list(range(spec.kv_heads))
    if gram is not None:
        weighted = gram.double().cpu() / gram.diagonal().double().mean().clamp(min=1e-30).cpu()
        if settings.group == "similar":
            order = similar_groups(heads, weighted, merged, settings.align)
        heads = heads.reordered(order)
        if settings.align:
            for first in range(0, spec.kv_heads, merged):
                for other in range(first + 1, first + merged):
                    heads.align(other, first, weighted)
    tensors = heads.pooled(merged).tensors(model, index)
    config = with_layer(model.config, index, _pooled(index, layer, settings.heads))
    return model.with_config(config).with_tensors(tensors)


class _Heads:
    """The matrices of one attention part, head by head, in f64.

    q (kv, each, d, in) and its bias as a last column where there is one; k, v (kv, d, in) likewise;
    o (kv, each, out, d).
    """

    def __init__(self, spec: Attention, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        self.spec, self.q, self.k, self.v, self.o = spec, q, k, v, o

    @classmethod
    def read(cls, model: Model, index: int, spec: Attention) -> _Heads:
        prefix, kv, d = f"layers.{index}.attention", spec.kv_heads, spec.head_dim

        def rows(role: str) -> Tensor:
            weight = torch.from_numpy(model.tensor(f"{prefix}.{role}.weight")).double()
            if not spec.qkv_bias:
                return weight
            bias = torch.from_numpy(model.tensor(f"{prefix}.{role}.bias")).double()
            return torch.cat((weight, bias[:, None]), dim=1)

        o = torch.from_numpy(model.tensor(f"{prefix}.o.weight")).double()
        q = rows("q")
        return cls(
            spec, q.reshape(kv, -1, d, q.shape[1]), rows("k").reshape(kv, d, -1), rows("v").reshape(kv, d, -1),
            o.reshape(len(o), kv, -1, d).permute(1, 2, 0, 3),
        )  # fmt: skip

    def reordered(self, order: Sequence[int]) -> _Heads:
        return _Heads(self.spec, self.q[order], self.k[order], self.v[order], self.o[order])

    def align(self, head: int, to: int, gram: Tensor) -> None:
        """Turn a head's values and keys towards those of head `to`; queries and output turn back."""
        turn = value_rotation(self.v[head], self.v[to], gram)
        self.v[head] = turn @ self.v[head]
        self.o[head] = self.o[head] @ turn.T
        if self.spec.qk_norm:
            return  # its weights are the head's own dimensions: they may not turn
        turn = key_rotation(self.k[head], self.k[to], gram, self.spec)
        self.k[head] = turn @ self.k[head]
        self.q[head] = turn @ self.q[head]

    def pooled(self, merged: int) -> _Heads:
        kv = len(self.k) // merged
        k, v = (x.reshape(kv, merged, *x.shape[1:]).mean(1) for x in (self.k, self.v))
        return _Heads(self.spec, self.q, k, v, self.o)

    def tensors(self, model: Model, index: int) -> dict[str, Float32 | StoredMatrix]:
        prefix = f"layers.{index}.attention"
        out = self.o.permute(2, 0, 1, 3).reshape(self.o.shape[2], -1)
        tensors = {f"{prefix}.o.weight": _float32(out)}
        for role, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            flat = x.reshape(-1, x.shape[-1])
            if self.spec.qkv_bias:
                tensors[f"{prefix}.{role}.bias"] = _float32(flat[:, -1])
                flat = flat[:, :-1]
            tensors[f"{prefix}.{role}.weight"] = _float32(flat)
        return {name: store_like(model, name, values) for name, values in tensors.items()}


def _float32(values: Tensor) -> Float32:
    found: Float32 = np.ascontiguousarray(values.float().numpy())
    return found


def value_rotation(head: Tensor, to: Tensor, gram: Tensor) -> Tensor:
    """Orthogonal R (d, d) of least |R V_head - V_to| over the calibration text (Procrustes).

    Args:
        head, to: (d, in) the rows that make the two heads' values; a bias column beyond the Gram's is left out.
        gram: (in, in).
    """
    size = len(gram)
    left, _, right = torch.linalg.svd(to[:, :size] @ gram @ head[:, :size].T)
    found: Tensor = left @ right
    return found


def key_rotation(head: Tensor, to: Tensor, gram: Tensor, spec: Attention) -> Tensor:
    """As `value_rotation`, but only turns that commute with the rotary embedding: one angle for each plane."""
    if spec.rope is None:
        return value_rotation(head, to, gram)
    size, half = len(gram), len(spec.rope.inverse_frequencies)
    cross = to[:, :size] @ gram @ head[:, :size].T  # (d, d)
    turn = torch.eye(len(head), dtype=head.dtype)
    first, second = torch.arange(half), torch.arange(half) + half
    along = cross[first, first] + cross[second, second]
    across = cross[second, first] - cross[first, second]
    length = torch.hypot(along, across).clamp(min=1e-300)
    cosine = torch.where(length > 1e-200, along / length, 1.0)
    sine = torch.where(length > 1e-200, across / length, 0.0)
    turn[first, first], turn[second, second] = cosine, cosine
    turn[first, second], turn[second, first] = -sine, sine
    return turn  # dimensions that no rotation reaches stay as they are


def similar_groups(heads: _Heads, gram: Tensor, merged: int, align: bool) -> list[int]:
    """An order of the heads in which neighbours by `merged` are near each other: greedily, the nearest first."""
    count = len(heads.k)
    distance = torch.zeros(count, count)
    for a in range(count):
        for b in range(a):
            distance[a, b] = distance[b, a] = _distance(heads, a, b, gram, align)
    left, order = list(range(count)), []
    while left:
        pairs = [(float(distance[a, b]), a, b) for a in left for b in left if a < b]
        group = list(min(pairs)[1:]) if pairs and merged > 1 else left[:1]
        while len(group) < merged:
            rest = [head for head in left if head not in group]
            group.append(min(rest, key=lambda head: (float(distance[head, group].sum()), head)))
        order += sorted(group)
        left = [head for head in left if head not in group]
    return order


def _distance(heads: _Heads, a: int, b: int, gram: Tensor, align: bool) -> float:
    """Squared distance of two heads' keys and values over the text, each as a share of their energy."""
    size = len(gram)
    total = 0.0
    for rows, turn in ((heads.v, value_rotation), (heads.k, lambda x, y, g: key_rotation(x, y, g, heads.spec))):
        one, two = rows[a], rows[b]
        if align and not (rows is heads.k and heads.spec.qk_norm):
            two = turn(two, one, gram) @ two
        change = (one - two)[:, :size]
        energy = sum(float(((x[:, :size] @ gram) * x[:, :size]).sum()) for x in (one, two))
        total += float(((change @ gram) * change).sum()) / max(energy, 1e-30)
    return total
