"""Makes a stress model: the same function as another one, with the outliers that large models grow.

Large language models have a few channels whose activations are 10 to 100 times the rest; rounding
activations or weights per row then loses what matters. Here such channels are made on purpose, by
scalings that cancel exactly:

- a few gains of every norm are multiplied, and the columns that read these channels (q, k, v after the
  attention norm; gate, up after the feed-forward norm) are divided by the same factor;
- a few rows of every `up` are multiplied, and the matching columns of `down` divided.

All factors are powers of two, so bf16 weights stay bf16 without rounding and the logits stay the same.
Tied embeddings are left alone: the final norm's gains feed the head, which is also the input.

    python examples/make_spiky.py examples/models/hearth-7m out/hearth-spiky
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.model.checkpoint import read_checkpoint, write_checkpoint
from trilemma.model.model import Model
from trilemma.model.plain import PlainMatrix, bf16_to_f32, f32_to_bf16
from trilemma.runtime import open_engine

FACTORS = (16.0, 32.0, 64.0)  # powers of two between 10 and 100: exact in every binary float
CHANNELS = 4  # outlier channels a norm
ROWS = 8  # outlier rows of an up projection
TOLERANCE = 1e-3  # of the largest logit; sums in f32 are rounded in another order of sizes


def make_spiky(model: Model, seed: int = 0, strength: float = 1.0) -> Model:
    """The same function with outlier channels. bf16 matrices stay bf16, exactly.

    Args:
        model: any decoder with gated or plain feed-forward blocks.
        seed: chooses channels and factors.
        strength: power of two that multiplies the factors of `up`; 4096 takes f16 beyond its range.
    """
    generator = np.random.default_rng(seed)
    changed: dict[str, NDArray[np.float32]] = {}
    for index, layer in enumerate(model.config.layers):
        prefix = f"layers.{index}"
        if layer.attention is not None:
            readers = [f"{prefix}.attention.{role}.weight" for role in ("q", "k", "v")]
            _spike_norm(model, changed, f"{prefix}.attention_norm.weight", readers, generator)
        if layer.ffn is not None:
            readers = [f"{prefix}.ffn.{role}.weight" for role in (("gate", "up") if layer.ffn.gated else ("up",))]
            _spike_norm(model, changed, f"{prefix}.ffn_norm.weight", readers, generator)
            if layer.ffn.gated:  # without a gate the activation stands between up and down
                _spike_up(model, changed, prefix, layer.ffn.hidden, generator, strength)
    return model.with_tensors({name: _as_stored(model, name, values) for name, values in changed.items()})


def _spike_norm(
    model: Model, changed: dict[str, NDArray[np.float32]], norm: str, readers: list[str], generator: np.random.Generator
) -> None:
    channels = generator.choice(model.config.dim, CHANNELS, replace=False)
    factors = generator.choice(FACTORS, CHANNELS).astype(np.float32)
    _tensor(model, changed, norm)[channels] *= factors
    for name in readers:
        _tensor(model, changed, name)[:, channels] /= factors


def _spike_up(
    model: Model, changed: dict[str, NDArray[np.float32]], prefix: str, hidden: int, generator: np.random.Generator,
    strength: float,
) -> None:  # fmt: skip
    rows = generator.choice(hidden, ROWS, replace=False)
    factors = generator.choice(FACTORS, ROWS).astype(np.float32) * np.float32(strength)
    _tensor(model, changed, f"{prefix}.ffn.up.weight")[rows] *= factors[:, None]
    if f"{prefix}.ffn.up.bias" in model.config.tensor_shapes():
        _tensor(model, changed, f"{prefix}.ffn.up.bias")[rows] *= factors
    _tensor(model, changed, f"{prefix}.ffn.down.weight")[:, rows] /= factors


def _tensor(model: Model, changed: dict[str, NDArray[np.float32]], name: str) -> NDArray[np.float32]:
    if name not in changed:
        changed[name] = model.tensor(name).copy()
    return changed[name]


def _as_stored(model: Model, name: str, values: NDArray[np.float32]) -> NDArray[np.float32] | PlainMatrix:
    """A bf16 matrix stays one. Vectors are checked too, since the folder is written in bf16."""
    if model.format_of(name) != "bf16":
        return values
    bits = f32_to_bf16(values)
    if not np.array_equal(bf16_to_f32(bits), values):
        raise SystemExit(
            f"error: '{name}' does not survive bf16 after scaling; a weight is close to the smallest float"
        )
    return PlainMatrix("bf16", bits) if values.ndim == 2 else values


def largest_relative_difference(one: Model, other: Model, tokens: NDArray[np.int32]) -> float:
    """max |logits - logits'| / max |logits| in the native engine's f32."""
    first, second = (open_engine(model).logits(tokens) for model in (one, other))
    return float(np.abs(first - second).max() / np.abs(first).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--strength", type=int, default=1, help="power of two on the outliers of up; 4096 overflows f16"
    )
    arguments = parser.parse_args()
    if arguments.strength < 1 or arguments.strength & (arguments.strength - 1):
        parser.error(f"--strength must be a power of two, not {arguments.strength}: others would round weights")
    model = read_checkpoint(arguments.model)
    stored_as = model.format_of("embedding.weight")
    write_checkpoint(
        make_spiky(model, arguments.seed, arguments.strength),
        arguments.output,
        dtype="bf16" if stored_as == "bf16" else "f32",
    )
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 128).astype(np.int32)
    difference = largest_relative_difference(model, read_checkpoint(arguments.output), tokens)
    print(f"{arguments.output}: largest logit difference {difference:.2e} of the largest logit")
    if difference > TOLERANCE:
        sys.exit(f"error: the logits differ by more than {TOLERANCE}; this is a bug")


if __name__ == "__main__":
    main()
