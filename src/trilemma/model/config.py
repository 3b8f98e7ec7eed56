"""What a decoder-only transformer is, as data.

A DecoderConfig is a list of LayerSpec records, so that no two layers need be alike after pruning.
The torch reference, the native engine and the cost arithmetic all read this one schema; families
(`model/families/`) translate Hugging Face configs into it.

Canonical tensor names (shapes are (out, in); biases and norms are vectors):
    embedding.weight (vocab, dim)             head.weight (vocab, dim; absent when tied)
    position.weight (max_context, dim; learned positions only)
    final_norm.weight (dim,)
    layers.{i}.attention_norm.weight          layers.{i}.ffn_norm.weight
    layers.{i}.attention_post_norm.weight     layers.{i}.ffn_post_norm.weight   (with post_norms)
    layers.{i}.attention.{q,k,v,o}.weight     layers.{i}.attention.{q,k,v,o}.bias
    layers.{i}.attention.{q,k}_norm.weight (head_dim,)                          (with qk_norm)
    layers.{i}.ffn.{gate,up,down}.weight      layers.{i}.ffn.{gate,up,down}.bias
Norms have a `.bias` too where `norm_bias` is set. Instead of a dense block, experts:
    layers.{i}.ffn.router.weight (experts, dim), twice the rows for the router kind 'glu'
    layers.{i}.ffn.experts.{e}.{gate,up,down}.weight
    layers.{i}.ffn.shared.{gate,up,down}.weight (with shared_hidden)
Beside each of a layer's matrices but the router, where it has a `low_rank`, a pair whose product adds to it:
    layers.{i}.attention.{q,k,v,o}_low_rank.a.weight (low_rank, in)   ..._low_rank.b.weight (out, low_rank)
A layer with `attention=None` or `ffn=None` has none of that part's tensors, norms included.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from trilemma.core.record import Record

Nonlinearity = Literal["silu", "gelu", "gelu_tanh", "relu"]
Shapes = dict[str, tuple[int, ...]]


class Rope(Record):
    """Rotary position embedding, rotate-half convention (Hugging Face order of dimensions).

    `inverse_frequencies` (rotary_dim/2,) already contain the scaling in use; `attention_factor`
    multiplies cos and sin (yarn). `kind` and `theta` are kept for export. Fewer than head_dim/2
    frequencies turn the first 2 x len dimensions of a head only.
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"] = "default"
    parameters: dict[str, float] = Field(default_factory=dict)
    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0


class Attention(Record):
    """Multi-head, grouped-query or multi-query attention. `scale` multiplies q.k.

    With a `window`, a query sees the last `window` positions, its own included. `qk_norm` is an
    RMS norm over each head's q and k before the rotation, with weights that heads share.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    scale: float
    window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False


class Dense(Record):
    """A feed-forward block: gated (down(act(gate x) * up x)) or plain (down(act(up x))).

    `bias` adds one to each of its matrices, `down_bias` to the last alone (compensation after pruning).
    """

    kind: Literal["dense"] = "dense"
    hidden: int
    activation: Nonlinearity = "silu"
    gated: bool = True
    bias: bool = False
    down_bias: bool = False


class Experts(Record):
    """`count` gated feed-forward blocks of width `hidden`, of which `active` run for a token.

    router: 'linear' scores x by router.weight (count, dim); 'glu' by |act(g) * u|, where g and u are the
        first and the second `count` rows of router.weight (2 count, dim) times x (representative neurons).
    gates: what the chosen experts' outputs are multiplied by: 'normalized' is the softmax over the chosen
        scores alone (Mixtral), 'softmax' that over all experts' scores, 'one' is 1.
    shared_hidden: width of a gated block that always runs beside them, multiplied by 1; 0 for none.
    Ties between scores go to the lower index; outputs are added in ascending order of experts, after the shared block.
    """

    kind: Literal["experts"] = "experts"
    count: int
    active: int
    hidden: int
    activation: Nonlinearity = "silu"
    router: Literal["linear", "glu"] = "linear"
    gates: Literal["normalized", "softmax", "one"] = "normalized"
    shared_hidden: int = 0
    down_bias: bool = False

    @property
    def router_rows(self) -> int:
        return self.count * (2 if self.router == "glu" else 1)


class LayerSpec(Record):
    """One residual layer: x + attention(norm x), then x + ffn(norm x).

    `parallel`: both parts read the layer's input, x + attention(norm x) + ffn(ffn_norm x).
    `post_norms`: each part's output is normed before it is added.
    `low_rank`: of the pair beside each matrix W but the router, (W + b a) x; 0 for none.
    """

    attention: Attention | None
    ffn: Dense | Experts | None
    parallel: bool = False
    post_norms: bool = False
    low_rank: Annotated[int, Field(ge=0)] = 0


# A mixture of experts has tens of thousands of tensors, whose shapes are asked for at each of them. The memory is not
# in the config itself, where it would take part in comparison and go along with changed copies.
_SHAPES: dict[int, tuple[weakref.ref[DecoderConfig], Shapes]] = {}


def _forget(key: int, _: object) -> None:
    _SHAPES.pop(key, None)


class DecoderConfig(Record):
    """A decoder-only transformer. `family` names the file in `families/`.

    norm: 'rms' is x / rms(x) * weight; 'layer' subtracts the mean first. `norm_bias` adds a bias to every norm
        but those of q and k, which are RMS norms always.
    embedding_scale: multiplies embedding rows (Gemma). `learned_positions` adds position.weight[position].
    """

    family: str
    dim: int
    vocab_size: int
    max_context: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    tied: bool
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    embedding_scale: float = 1.0
    learned_positions: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def tensor_shapes(self) -> Shapes:
        """Canonical name -> shape of every tensor of the model, in file order."""
        known = _SHAPES.get(id(self))
        if known is None or known[0]() is not self:
            known = (weakref.ref(self, partial(_forget, id(self))), self._tensor_shapes())
            _SHAPES[id(self)] = known
        return dict(known[1])

    def _tensor_shapes(self) -> Shapes:
        shapes: Shapes = {"embedding.weight": (self.vocab_size, self.dim)}
        if self.learned_positions:
            shapes["position.weight"] = (self.max_context, self.dim)
        for index, layer in enumerate(self.layers):
            prefix = f"layers.{index}"
            if layer.attention is not None:
                shapes |= self._norm_shapes(f"{prefix}.attention_norm")
                attention = _attention_shapes(f"{prefix}.attention", layer.attention, self.dim)
                shapes |= dict(_with_pairs(attention, layer.low_rank))
                if layer.post_norms:
                    shapes |= self._norm_shapes(f"{prefix}.attention_post_norm")
            if layer.ffn is not None:
                shapes |= self._norm_shapes(f"{prefix}.ffn_norm")
                shapes |= dict(_with_pairs(_ffn_shapes(f"{prefix}.ffn", layer.ffn, self.dim), layer.low_rank))
                if layer.post_norms:
                    shapes |= self._norm_shapes(f"{prefix}.ffn_post_norm")
        shapes |= self._norm_shapes("final_norm")
        if not self.tied:
            shapes["head.weight"] = (self.vocab_size, self.dim)
        return shapes

    def linear_names(self) -> list[str]:
        """Names of the matrices inside layers (not embedding, not head), in order of execution."""
        return [name for name, shape in self.tensor_shapes().items() if len(shape) == 2 and name.startswith("layers.")]

    def product_names(self) -> list[str]:
        """Names of the matrices that activations are multiplied by: those inside layers, and the head's; file order."""
        inside = self.linear_names()
        return ["embedding.weight", *inside] if self.tied else [*inside, "head.weight"]

    def _norm_shapes(self, name: str) -> Shapes:
        shapes: Shapes = {f"{name}.weight": (self.dim,)}
        return shapes | {f"{name}.bias": (self.dim,)} if self.norm_bias else shapes


_LOW_RANK = "_low_rank"
NamedShapes = Iterator[tuple[str, tuple[int, ...]]]


def is_router(name: str) -> bool:
    """Whether a canonical tensor chooses experts: small, and a wrong choice costs much, so it stays unquantized."""
    return name.endswith(".router.weight")


def low_rank_names(name: str) -> tuple[str, str]:
    """Names of the pair (a, b) beside a matrix of a layer."""
    prefix = name.removesuffix(".weight") + _LOW_RANK
    return f"{prefix}.a.weight", f"{prefix}.b.weight"


def is_low_rank(name: str) -> bool:
    """Whether a canonical tensor is one of a low-rank pair."""
    return _LOW_RANK in name


def with_low_rank(config: DecoderConfig, rank: int) -> DecoderConfig:
    """The same, with a pair of that rank beside each matrix of the layers; of rank 0 with none."""
    layers = (
        each.model_copy(update={"low_rank": rank}) if each.attention or each.ffn else each for each in config.layers
    )
    return config.model_copy(update={"layers": tuple(layers)})


def _with_pairs(shapes: NamedShapes, rank: int) -> NamedShapes:
    for name, shape in shapes:
        yield name, shape
        if rank and len(shape) == 2 and not is_router(name):
            a, b = low_rank_names(name)
            yield a, (rank, shape[1])
            yield b, (shape[0], rank)


def _attention_shapes(prefix: str, spec: Attention, dim: int) -> NamedShapes:
    q_dim, kv_dim = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    for role, rows in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
        yield f"{prefix}.{role}.weight", (rows, dim)
        if spec.qkv_bias:
            yield f"{prefix}.{role}.bias", (rows,)
    for role in ("q", "k") if spec.qk_norm else ():
        yield f"{prefix}.{role}_norm.weight", (spec.head_dim,)
    yield f"{prefix}.o.weight", (dim, q_dim)
    if spec.o_bias:
        yield f"{prefix}.o.bias", (dim,)


def _ffn_shapes(prefix: str, spec: Dense | Experts, dim: int) -> NamedShapes:
    if isinstance(spec, Dense):
        yield from _dense_shapes(prefix, spec, dim)
        return
    yield f"{prefix}.router.weight", (spec.router_rows, dim)
    if spec.shared_hidden:
        yield from _dense_shapes(f"{prefix}.shared", Dense(hidden=spec.shared_hidden), dim)
    for expert in range(spec.count):
        yield from _dense_shapes(f"{prefix}.experts.{expert}", Dense(hidden=spec.hidden), dim)
    if spec.down_bias:
        yield f"{prefix}.down.bias", (dim,)


def _dense_shapes(prefix: str, spec: Dense, dim: int) -> NamedShapes:
    for role in ("gate", "up") if spec.gated else ("up",):
        yield f"{prefix}.{role}.weight", (spec.hidden, dim)
        if spec.bias:
            yield f"{prefix}.{role}.bias", (spec.hidden,)
    yield f"{prefix}.down.weight", (dim, spec.hidden)
    if spec.bias or spec.down_bias:
        yield f"{prefix}.down.bias", (dim,)
