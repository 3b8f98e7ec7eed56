"""Where the scale of an activation channel can go without changing the function: into what writes it and what reads it.

Pairs: attention norm -> q, k, v; v -> o; ffn norm -> gate, up (and router); up -> down of gated blocks.
Left out: what a nonlinearity separates (plain blocks' up -> down), and the final norm of a tied head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trilemma.model.config import DecoderConfig, Experts
from trilemma.model.model import Float32, Model

_READERS = (".gate.weight", ".up.weight", ".router.weight")


@dataclass(frozen=True)
class Fold:
    """One place: `writers` are divided by a scale for each channel, `readers`' columns multiplied by it.

    shared: (kv_heads, queries of each, head_dim) where several columns of the readers read one channel.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    shared: tuple[int, int, int] | None = None

    def of_channels(self, columns: Float32, how: Literal["max", "mean"] = "max") -> Float32:
        """(in,) values of the readers' columns -> (channels,): the largest, or the mean, of those that read one."""
        if self.shared is None:
            return columns
        grouped = columns.reshape(self.shared)
        found: Float32 = (grouped.max(axis=1) if how == "max" else grouped.mean(axis=1)).reshape(-1)
        return found

    def of_columns(self, scales: Float32) -> Float32:
        """(channels,) scales -> (in,) scales of the readers' columns."""
        if self.shared is None:
            return scales
        kv_heads, queries, head_dim = self.shared
        return np.repeat(scales.reshape(kv_heads, head_dim), queries, axis=0).reshape(-1)


class Folded:
    """Tensors of a model with scales folded in, the rest as they are."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.values: dict[str, Float32] = {}

    def get(self, name: str) -> Float32:
        """The tensor as it is now."""
        if name not in self.values:
            self.values[name] = self.model.tensor(name).copy()
        return self.values[name]

    def fold(self, place: Fold, scales: Float32) -> None:
        """Divide the writers by `scales` (channels,) and multiply the readers by them."""
        for name in place.writers:
            values = self.get(name)
            values /= scales[:, None] if values.ndim == 2 else scales
        columns = place.of_columns(scales)
        for name in place.readers:
            values = self.get(name)
            values *= columns[None, :]


def folds(config: DecoderConfig, index: int) -> Iterator[Fold]:
    """Every place of a layer where a channel's scale can go, in the order in which a token meets them."""
    shapes = config.tensor_shapes()
    layer, prefix = config.layers[index], f"layers.{index}"

    def known(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in shapes)

    if layer.attention is not None:
        spec, at = layer.attention, f"{prefix}.attention"
        norm = known(f"{prefix}.attention_norm.weight", f"{prefix}.attention_norm.bias")
        yield Fold(norm, tuple(f"{at}.{role}.weight" for role in "qkv"))
        shared = (spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim)
        yield Fold(known(f"{at}.v.weight", f"{at}.v.bias"), (f"{at}.o.weight",), shared)
    if layer.ffn is not None:
        inner = tuple(name for name in shapes if name.startswith(f"{prefix}.ffn.") and name.endswith(_READERS))
        yield Fold(known(f"{prefix}.ffn_norm.weight", f"{prefix}.ffn_norm.bias"), inner)
        if isinstance(layer.ffn, Experts) or layer.ffn.gated:
            for down in [n for n in shapes if n.startswith(f"{prefix}.ffn.") and n.endswith(".down.weight")]:
                up = down.removesuffix(".down.weight") + ".up"
                yield Fold(known(f"{up}.weight", f"{up}.bias"), (down,))
