"""Rotation: turn the residual stream and the values, so that no channel stands out when it is rounded.

QuaRot (Ashkboos et al., 2024, arXiv:2404.00456) and SpinQuant (Liu et al., 2024, arXiv:2405.16406), the part that
folds into weights and costs nothing at run time; the function stays the same but for rounding in f32.

- The residual stream x becomes x R. What writes to it (embedding, positions, o, down) is turned; the gains of norms
  move into the columns of what reads it, which are turned back. A norm without gains is the same for x and x R; one
  that subtracts the mean is so when R keeps the mean.
- The values of a head become v R_h, undone in the columns of o, for every query head that reads them.

A tied head reads the stream through the final norm's gains w, which can not move into it: it is the embedding too. So R
must leave diag(w) as it is: channels of equal gain, to the bit, are turned among each other (gains stored in bf16 take
few values), and the model stays tied. `tied: untie` makes the head a matrix of its own, and R whole.
Layers that norm their outputs (post norms) hold the stream fast: of such models only values are turned.

Tensors are turned as they are read, so that the model is never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trilemma.core.errors import RecipeError
from trilemma.model.config import DecoderConfig, Dense
from trilemma.model.located import Located
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.techniques.quantize.orthogonal import Rotation
from trilemma.techniques.stored import refuse_packed
from trilemma.techniques.technique import Build, TechniqueSettings

_LEAST_GAIN = 1e-3  # of a norm's largest: a bias divided by less would be an outlier
_VALUES = (".v.weight", ".v.bias", ".o.weight")


class RotateSettings(TechniqueSettings):
    """Settings of `rotate`."""

    stream: bool = Field(True, description="turn the residual stream; models with post norms can not")
    values: bool = Field(True, description="turn the values of each head")
    tied: Literal["keep", "untie"] = Field(
        "keep",
        description="of a tied head: keep it and turn channels of equal final gain alone, or untie it (more bytes)",
    )


class Rotate:
    """Turn activations before they and the weights are rounded."""

    name: ClassVar[str] = "rotate"
    what: ClassVar[str] = (
        "turn the residual stream and the values so that no channel stands out (QuaRot); same function"
    )
    Settings: ClassVar[type[RotateSettings]] = RotateSettings

    def supports(self, config: DecoderConfig) -> str | None:
        if turns_stream(config) or any(layer.attention for layer in config.layers):
            return None
        return "post norms hold its residual stream, and it has no attention whose values could be turned"

    def needs_calibration(self, settings: RotateSettings) -> bool:
        return False

    def config_after(self, config: DecoderConfig, settings: RotateSettings) -> DecoderConfig:
        """The same, but for a head that is untied."""
        if config.tied and settings.stream and settings.tied == "untie" and turns_stream(config):
            return config.model_copy(update={"tied": False})
        return config

    def exact(self, settings: RotateSettings) -> bool:
        return True

    def origin(self, name: str) -> str | None:
        """The head that is untied is stored as the embedding was."""
        return "embedding.weight" if name == "head.weight" else None

    def apply(self, model: Model, settings: RotateSettings, build: Build) -> Model:
        """Raises RecipeError where matrices are packed already, or a norm with a bias has gains near 0."""
        refuse_packed(model, self.name, "rotate+W4A8-g32-gptq")
        config = self.config_after(model.config, settings)
        stream = None
        if settings.stream and turns_stream(config):
            stream = stream_rotation(model, build.seed, tied=config.tied)
            _check_gains(model, config)
        values = value_rotations(config, build.seed) if settings.values else {}
        source = TurnedTensors(model, config, stream, values)
        return Model(config, source, path=model.path, linears=model.linears, run=model.run)


def turns_stream(config: DecoderConfig) -> bool:
    """Whether nothing but norms in front of matrices treats the residual stream channel by channel."""
    return not any(layer.post_norms for layer in config.layers)


def stream_rotation(model: Model, seed: int, *, tied: bool) -> Rotation:
    """R (dim, dim): whole, or of a tied head within the channels of equal final gain."""
    groups: list[NDArray[np.intp]] = [np.arange(model.config.dim)]
    if tied:
        _, which = np.unique(model.tensor("final_norm.weight"), return_inverse=True)
        groups = [np.flatnonzero(which == at) for at in range(which.max() + 1)]
    return Rotation.random(groups, (seed, 0), keeps_mean=model.config.norm == "layer")


def value_rotations(config: DecoderConfig, seed: int) -> dict[int, Rotation]:
    """Layer -> what turns the values of its key-value heads."""
    return {
        index: Rotation.of_heads(layer.attention.kv_heads, layer.attention.head_dim, (seed, 1, index))
        for index, layer in enumerate(config.layers)
        if layer.attention is not None
    }


class TurnedTensors:
    """A source that makes turned tensors of a model whenever they are read; those that stay are the model's own.

    Args:
        config: the model's, or with an untied head where the model's is tied.
        stream: what turns the residual stream, or None.
        values: layer -> what turns its values.
    """

    def __init__(
        self, model: Model, config: DecoderConfig, stream: Rotation | None, values: Mapping[int, Rotation]
    ) -> None:
        self._model, self._config, self._stream, self._turns = model, config, stream, dict(values)

    def stored_dtype(self, name: str) -> str:
        return "f32" if self._changes(name) else self._model.format_of(name)

    def read(self, name: str) -> Float32 | StoredMatrix:
        if not self._changes(name):
            return self._model.stored(name)
        found = self._values(name)
        return found if self._stream is None else self._at_stream(name, found, self._stream)

    def locate(self, name: str) -> Located | None:
        return None if self._changes(name) else self._model.locate(name)

    def _changes(self, name: str) -> bool:
        if self._turns and name.endswith(_VALUES):
            return True
        if self._stream is None or name.endswith(("q_norm.weight", "k_norm.weight")):
            return False
        owner, _, kind = name.rpartition(".")
        if kind == "bias" and _norm_before(owner):
            return self._config.norm_bias
        return name != "final_norm.weight" or not self._config.tied

    def _values(self, name: str) -> Float32:
        """The tensor with the values turned."""
        untied = name == "head.weight" and self._model.config.tied
        found = self._model.tensor("embedding.weight" if untied else name)
        if not self._turns or not name.endswith(_VALUES):
            return found
        index = int(name.split(".")[1])
        spec, turn = self._config.layers[index].attention, self._turns[index]
        assert spec is not None
        if name.endswith(".o.weight"):
            return turn.for_queries(spec.heads // spec.kv_heads).turn(found)
        return turn.turn_rows(found)

    def _at_stream(self, name: str, found: Float32, turn: Rotation) -> Float32:
        """The tensor with the residual stream turned, of one with the values turned."""
        owner, _, kind = name.rpartition(".")
        if owner.endswith("norm"):
            return self._norm(owner, kind, found, turn)
        if owner.endswith((".o", ".down")):
            return turn.turn_rows(found)
        norm = "final_norm" if owner == "head" else _norm_before(owner)
        if norm is None:  # embedding, positions
            return turn.turn(found)
        if kind == "bias":  # takes the norm's as well
            if not self._config.norm_bias:
                return found
            seen: Float32 = found + self._values(f"{owner}.weight") @ self._model.tensor(f"{norm}.bias")
            return seen
        return turn.turn(found * self._model.tensor(f"{norm}.weight"))

    def _norm(self, owner: str, kind: str, found: Float32, turn: Rotation) -> Float32:
        if kind == "weight":
            return np.ones_like(found)
        if owner == "final_norm" and self._config.tied:
            return turn.turn(found)
        if _readers_have_bias(self._config, owner):
            return np.zeros_like(found)
        return turn.turn(found / self._model.tensor(f"{owner}.weight"))


def _norm_before(owner: str) -> str | None:
    """The norm through which a matrix inside a layer reads the stream."""
    layer = ".".join(owner.split(".")[:2])
    if owner.endswith((".q", ".k", ".v")):
        return f"{layer}.attention_norm"
    return f"{layer}.ffn_norm" if owner.endswith((".gate", ".up", ".router")) else None


def _readers_have_bias(config: DecoderConfig, norm: str) -> bool:
    if norm == "final_norm":
        return False
    layer = config.layers[int(norm.split(".")[1])]
    if norm.endswith("attention_norm"):
        return layer.attention is not None and layer.attention.qkv_bias
    return isinstance(layer.ffn, Dense) and layer.ffn.bias


def _check_gains(model: Model, config: DecoderConfig) -> None:
    """Biases of norms whose readers have none are divided by the gains, which move behind them."""
    for name in config.tensor_shapes():
        owner = name.removesuffix(".bias")
        if not name.endswith("norm.bias") or _readers_have_bias(config, owner):
            continue
        gains = np.abs(model.tensor(f"{owner}.weight"))
        if not (config.tied and owner == "final_norm") and gains.min() < _LEAST_GAIN * gains.max():
            raise RecipeError(
                f"'rotate' divides the bias of '{owner}' by its gains, which lie between {gains.min():.3g} and "
                f"{gains.max():.3g} in size. Leave the residual stream as it is with the setting 'stream: false'."
            )
