"""A model as plain files that any engine's script can read without Trilemma: numbers in .npy, structure in JSON.

    model.json              dims, rotation, norm, format
    NAME.npy                a norm's weights, f32
    NAME.codes.npy          (out, in) int8 codes of a matrix on a symmetric grid
    NAME.scales.npy         (out, groups) f16; the matrix is codes x scales, group by group

Weights are those of our artifact, bit for bit. Left out: biases, asymmetric grids, models that are not like llama.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from trilemma.core.errors import UnsupportedModelError
from trilemma.formats.artifact import load_any
from trilemma.formats.grid import QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, unpack
from trilemma.model.config import Attention, DecoderConfig, Dense, LayerSpec

DESCRIPTION = "model.json"


def write_dump(artifact: Path, folder: Path) -> None:
    """Write the weights of an artifact into `folder`, a tensor at a time.

    Raises:
        UnsupportedModelError: a structure or format that the peers' graphs do not express.
    """
    model = load_any(artifact)
    folder.mkdir(parents=True)
    found = describe(model.config)
    for name, shape in model.config.tensor_shapes().items():
        tensor = model.stored(name)
        if len(shape) == 1:
            np.save(folder / f"{name}.npy", np.asarray(tensor, np.float32))
            continue
        grid = unpack(tensor) if isinstance(tensor, PackedMatrix) else tensor
        if not isinstance(grid, QuantizedMatrix) or grid.minima is not None:
            raise UnsupportedModelError(
                f"'{name}' is no symmetric integer matrix. Dump a model in int4-g32 or int8-g32."
            )
        np.save(folder / f"{name}.codes.npy", grid.codes)
        np.save(folder / f"{name}.scales.npy", grid.scales)
        found |= {"format": grid.spec.name, "bits": grid.spec.bits, "group": grid.spec.group}
    (folder / DESCRIPTION).write_text(json.dumps(found, indent=1), encoding="utf-8")


def describe(config: DecoderConfig) -> dict[str, Any]:
    """The structure of a llama-like model whose layers are all alike.

    Raises:
        UnsupportedModelError: anything else.
    """
    layer = config.layers[0]
    attention, ffn = layer.attention, layer.ffn
    like_llama = (
        all(other == layer for other in config.layers) and layer == LayerSpec(attention=attention, ffn=ffn)
        and isinstance(attention, Attention) and isinstance(ffn, Dense) and ffn == Dense(hidden=ffn.hidden)
        and attention.rope is not None and not (attention.window or attention.qkv_bias or attention.o_bias)
        and not attention.qk_norm and config.norm == "rms" and config.embedding_scale == 1.0
    )  # fmt: skip
    if not like_llama or attention is None or attention.rope is None or not isinstance(ffn, Dense):
        raise UnsupportedModelError("The peers' graphs are those of llama; give a model of that family.")
    return {
        "dim": config.dim, "vocab": config.vocab_size, "layers": len(config.layers), "hidden": ffn.hidden,
        "heads": attention.heads, "kv_heads": attention.kv_heads, "head_dim": attention.head_dim,
        "scale": attention.scale, "eps": config.norm_eps, "tied": config.tied, "max_context": config.max_context,
        "inverse_frequencies": list(attention.rope.inverse_frequencies),
        "attention_factor": attention.rope.attention_factor,
    }  # fmt: skip


__all__ = ["describe", "write_dump"]
