"""Fewer key-value heads: groups of them become one, by their mean or by the best projection.

Mean pooling is Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023
(arXiv:2305.13245), who train for 5% of pre-training afterwards. Heads speak different languages, so here,
by default, the one head is what says most about all of the group on calibration text, and each query head gets
a translation, folded into its weights:

- values: the principal components of the group's stacked values, in the metric of what the output matrix
  makes of them; the way back goes into the output matrix;
- keys: the same in each rotary plane, where a head is a complex number that may be turned and scaled without
  disturbing the rotation; the way back goes into the queries.

Equal heads, and heads equal but for such a turn, are merged without any loss. (Turning heads towards each other
before their mean is Jin et al., 2024, arXiv:2412.20677; a projection is at least as near.) A `heal` step may follow.
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
        "similar", description="which heads are merged: those that lose least together, or adjacent ones"
    )
    merge: Literal["project", "mean"] = Field(
        "project", description="project: the best common head and a translation for each; mean: of keys and of values"
    )


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
        return settings.merge == "project" or settings.group == "similar"

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
        gram: X^T X (dim, dim) of what enters q, k and v; needed to project heads or to find similar ones.
    """
    layer = model.config.layers[index]
    spec = layer.attention
    if spec is None or spec.kv_heads == settings.heads:
        return model
    heads = _Heads.read(model, index, spec)
    merged = spec.kv_heads // settings.heads
    if gram is not None:
        gram = gram.cpu().double()  # heads are small matrices: all of this is computed on the CPU
        gram = gram / gram.diagonal().mean().clamp(min=1e-30)
        if settings.group == "similar":
            heads = heads.some(similar_groups(heads, gram, merged, settings.merge))
    groups = [heads.some(range(first, first + merged)) for first in range(0, spec.kv_heads, merged)]
    made = _Heads.join([_merge(group, gram, settings.merge)[0] for group in groups])
    config = with_layer(model.config, index, _pooled(index, layer, settings.heads))
    return model.with_config(config).with_tensors(made.tensors(model, index))


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

    def some(self, heads: Sequence[int]) -> _Heads:
        """These key-value heads with their query heads."""
        chosen = list(heads)
        return _Heads(self.spec, self.q[chosen], self.k[chosen], self.v[chosen], self.o[chosen])

    @classmethod
    def join(cls, groups: Sequence[_Heads]) -> _Heads:
        return cls(groups[0].spec, *(torch.cat([getattr(g, name) for g in groups]) for name in ("q", "k", "v", "o")))

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


def _merge(group: _Heads, gram: Tensor | None, how: str) -> tuple[_Heads, float]:
    """The group with one key-value head, and the share of the energy of keys and of values that is lost, summed."""
    k, v, q, o = group.k.mean(0), group.v.mean(0), group.q, group.o
    lost = 0.0 if gram is None else _spread(group.k, gram) + _spread(group.v, gram)
    if how == "project" and gram is not None:
        reading = torch.einsum("heod,heoc->hdc", o, o)
        v, back, lost = project(group.v, reading, gram)
        o = torch.einsum("heod,hdc->heoc", o, back)
        if group.spec.qk_norm:  # its weights are the head's own dimensions: keys may not turn
            lost += _spread(group.k, gram)
        else:
            k, q, lost_keys = project_keys(group.k, group.q, gram, group.spec)
            lost += lost_keys
    return _Heads(group.spec, q, k[None], v[None], o), lost


def project(rows: Tensor, metrics: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, float]:
    """One head for several: p with rows_h ~ back_h p, of least sum of |rows_h x - back_h p x|^2 in each head's metric.

    Args:
        rows: (heads, d, in) what makes each head's d values; columns beyond the Gram's (a bias) go along.
        metrics: (heads, d, d) positive: an error e of head h counts e^T metrics_h e.
        gram: (in, in) of the inputs.

    Returns:
        p (d, in), back (heads, d, d), and the share of the energy that is lost.
    """
    heads, d, _ = rows.shape
    mean = metrics.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-30)
    energies, axes = torch.linalg.eigh(metrics / mean + 1e-6 * torch.eye(d, dtype=rows.dtype))
    roots = axes @ torch.diag_embed(energies.clamp(min=1e-12).sqrt()) @ axes.mT
    stacked = (roots @ rows).reshape(heads * d, -1)
    known = stacked[:, : len(gram)]
    values, vectors = torch.linalg.eigh(known @ gram @ known.T)
    best = vectors[:, -d:]
    back = torch.linalg.solve(roots, best.reshape(heads, d, d))
    left, _, right = torch.linalg.svd(back[0])  # near the first head's own directions: energy spread as it was
    turn = left @ right
    lost = float(values[:-d].clamp(min=0).sum() / values.clamp(min=0).sum().clamp(min=1e-300))
    return turn @ best.T @ stacked, back @ turn.T, lost


def project_keys(k: Tensor, q: Tensor, gram: Tensor, spec: Attention) -> tuple[Tensor, Tensor, float]:
    """As `project`, with turns and scales that commute with the rotary embedding: one complex number for each plane.

    Args:
        k: (heads, d, in); q: (heads, each, d, in), changed so that scores stay as near as they can.

    Returns:
        the common key head (d, in), the queries, and the share of the energy that is lost.
    """
    half, size = 0 if spec.rope is None else len(spec.rope.inverse_frequencies), len(gram)
    made_k, made_q, lost = torch.empty_like(k[0]), q.clone(), 0.0
    if half:
        keys, queries = (
            torch.complex(k[:, :half], k[:, half : 2 * half]),
            torch.complex(q[:, :, :half], q[:, :, half : 2 * half]),
        )
        complex_gram = gram.to(keys.dtype)
        known = queries[..., :size]
        weight = ((known @ complex_gram) * known.conj()).real.sum((1, 3)).clamp(min=0).sqrt()  # (heads, half)
        weight = weight.clamp(min=1e-6 * float(weight.mean()) + 1e-30)
        weighted = keys * weight[..., None]
        known = weighted[..., :size].transpose(0, 1)  # (half, heads, in)
        values, vectors = torch.linalg.eigh(known @ complex_gram @ known.mH)
        best = vectors[:, :, -1].T  # (heads, half)
        best = best * torch.exp(-1j * best[:1].angle())  # the first head keeps its phase
        scale = weight.mean(0)  # the common key is of a key's size
        common = (best.conj()[..., None] * weighted).sum(0) / scale[:, None]
        turned = queries * ((best * scale / weight).conj())[:, None, :, None]
        made_k[:half], made_k[half : 2 * half] = common.real, common.imag
        made_q[:, :, :half], made_q[:, :, half : 2 * half] = turned.real, turned.imag
        lost += float(values[:, :-1].clamp(min=0).sum() / values.clamp(min=0).sum().clamp(min=1e-300))
    if 2 * half < spec.head_dim:  # dimensions that do not rotate
        rest = q[:, :, 2 * half :]
        metrics = torch.einsum("hedi,ij,hecj->hdc", rest[..., :size], gram, rest[..., :size])
        made_k[2 * half :], back, also = project(k[:, 2 * half :], metrics, gram)
        made_q[:, :, 2 * half :] = torch.einsum("hedi,hdc->heci", rest, back)
        lost += also
    return made_k, made_q, lost


def _spread(rows: Tensor, gram: Tensor) -> float:
    """Share of the energy of rows (heads, d, in) that their mean does not hold."""
    known = rows[..., : len(gram)]
    change = known - known.mean(0)
    energy = float(((known @ gram) * known).sum())
    return float(((change @ gram) * change).sum()) / max(energy, 1e-300)


def similar_groups(heads: _Heads, gram: Tensor, merged: int, how: str) -> list[int]:
    """An order of the heads in which neighbours by `merged` lose little together: greedily, the best pair first."""
    count = len(heads.k)
    distance = torch.zeros(count, count)
    for a in range(count):
        for b in range(a):
            distance[a, b] = distance[b, a] = _merge(heads.some([b, a]), gram, how)[1]
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
