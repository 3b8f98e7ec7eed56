"""The torch module of every DecoderConfig: reference, calibration and training.

Its parts are in `blocks.py`. Submodules are named so that `state_dict` keys are the canonical tensor
names. Layers can be built one by one from a Model (`layer_from_model`), so that calibration holds one
of them at a time. Speed is not its aim; the native engine is for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trilemma.core.errors import CheckpointError
from trilemma.model.blocks import DecoderLayer, KvSlot, make_norm
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.model.plain import PlainDtype, PlainMatrix, f32_to_bf16
from trilemma.model.sources import MemorySource


class Decoder(nn.Module):
    """A whole model. With `gradient_checkpointing`, training keeps one activation a layer."""

    def __init__(self, config: DecoderConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position = nn.Embedding(config.max_context, config.dim) if config.learned_positions else None
        self.layers = nn.ModuleList(DecoderLayer(spec, config) for spec in config.layers)
        self.final_norm = make_norm(config)
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
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.embed(tokens, positions)
        for index, layer in enumerate(self.layers):
            slot = None if slots is None else slots[index]
            if self.gradient_checkpointing and self.training and slot is None:
                x = checkpoint(layer, x, positions, use_reentrant=False)
            else:
                x = layer(x, positions, slot)
        return x

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What enters the first layer (batch, time, dim), of tokens (batch, time) at `positions` (time,)."""
        x: Tensor = self.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        return x if self.position is None else x + self.position(positions)

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
        layer = DecoderLayer(model.config.layers[index], model.config)
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


def _assign(module: nn.Module, model: Model, prefix: str, dtype: torch.dtype, device: str | torch.device) -> None:
    """Put the model's tensors in place of the module's empty (meta) parameters, one at a time."""
    for name, _ in list(module.named_parameters()):
        values = model.tensor(prefix + name)
        if not np.isfinite(values).all():
            raise CheckpointError(f"Tensor '{prefix + name}' has NaN or infinite values; fetch the checkpoint again.")
        tensor = torch.from_numpy(np.array(values, dtype=np.float32, order="C")).to(device=device, dtype=dtype)
        owner_name, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner_name), leaf, nn.Parameter(tensor))


__all__ = ["Decoder", "DecoderLayer", "KvSlot", "canonical_tensors", "decoder_to_model", "layer_from_model"]
