"""A model with fewer channels or heads in one layer: configs and tensors, no choice of what goes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trilemma.model.config import Attention, DecoderConfig, Dense, LayerSpec
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.techniques.stored import store_like


def with_layer(config: DecoderConfig, index: int, layer: LayerSpec) -> DecoderConfig:
    """The same config with another layer `index`."""
    layers = (*config.layers[:index], layer, *config.layers[index + 1 :])
    return config.model_copy(update={"layers": layers})


def narrow_ffn(spec: Dense, hidden: int, *, bias: bool) -> Dense:
    """`spec` of another width; bias: with one on the way down, if it has none."""
    return spec.model_copy(update={"hidden": hidden, "down_bias": spec.down_bias or (bias and not spec.bias)})


def cut_channels(model: Model, index: int, keep: Sequence[int], down: Float32, shift: Float32 | None) -> Model:
    """Keep the FFN channels `keep` of layer `index`.

    Args:
        down: (dim, len(keep)) what the way down becomes.
        shift: (dim,) added to the output's bias; None leaves it as it is.
    """
    layer = model.config.layers[index]
    spec = layer.ffn
    assert isinstance(spec, Dense)
    prefix = f"layers.{index}.ffn"
    rows = np.asarray(keep)
    narrow = narrow_ffn(spec, len(rows), bias=shift is not None)
    tensors = _rows_of(model, [f"{prefix}.gate", f"{prefix}.up"], rows)
    tensors |= _output(model, f"{prefix}.down", down, shift)
    config = with_layer(model.config, index, layer.model_copy(update={"ffn": narrow}))
    return model.with_config(config).with_tensors(tensors)


def cut_heads(
    model: Model, index: int, kv_keep: Sequence[int], keep: Sequence[int], o: Float32, shift: Float32 | None
) -> Model:
    """Keep the key-value heads `kv_keep` and the query heads `keep` of layer `index`.

    Args:
        keep: ascending, the same number for each kept key-value head.
        o: (dim, len(keep) x head_dim) what the output matrix becomes.
        shift: (dim,) added to its bias; None leaves it as it is.
    """
    layer = model.config.layers[index]
    spec = layer.attention
    assert isinstance(spec, Attention)
    prefix = f"layers.{index}.attention"
    tensors = _rows_of(model, [f"{prefix}.q"], head_columns(keep, spec.head_dim))
    tensors |= _rows_of(model, [f"{prefix}.k", f"{prefix}.v"], head_columns(kv_keep, spec.head_dim))
    tensors |= _output(model, f"{prefix}.o", o, shift)
    narrow = spec.model_copy(
        update={"heads": len(keep), "kv_heads": len(kv_keep), "o_bias": spec.o_bias or shift is not None}
    )
    config = with_layer(model.config, index, layer.model_copy(update={"attention": narrow}))
    return model.with_config(config).with_tensors(tensors)


def head_columns(heads: Sequence[int], head_dim: int) -> np.ndarray:
    """Places (len(heads) x head_dim,) of these heads' values among those of all heads."""
    found: np.ndarray = (np.asarray(heads)[:, None] * head_dim + np.arange(head_dim)).reshape(-1)
    return found


def _rows_of(model: Model, matrices: Sequence[str], rows: np.ndarray) -> dict[str, Float32 | StoredMatrix]:
    """Weights and biases of these matrices with some of their outputs; those that the model lacks are passed over."""
    names = [f"{name}.{kind}" for name in matrices for kind in ("weight", "bias")]
    shapes = model.config.tensor_shapes()
    return {name: store_like(model, name, model.tensor(name)[rows]) for name in names if name in shapes}


def _output(model: Model, name: str, weight: Float32, shift: Float32 | None) -> dict[str, Float32 | StoredMatrix]:
    tensors: dict[str, Float32 | StoredMatrix] = {f"{name}.weight": store_like(model, f"{name}.weight", weight)}
    if shift is not None:
        bias = f"{name}.bias"
        before = model.tensor(bias) if bias in model.config.tensor_shapes() else np.zeros_like(shift)
        tensors[bias] = before + shift
    return tensors
