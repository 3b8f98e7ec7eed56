"""How far the model's answers move with each output of each matrix: E[g g^T], g the gradient at the outputs.

g is that of the log-probability of a token which the model itself draws at every position, so the mean is the Fisher
matrix: for small errors e of a matrix's outputs the KL divergence of the model's answers grows by e^T E[g g^T] e / 2.
Tseng et al., "Model-Preserving Adaptive Rounding", 2025 (arXiv:2505.22988), sketch B without its input weights.

Embedding and head are rows of a vocabulary: `vocabulary_guide.py`.

The windows go through in parts, forwards and back a layer at a time, so that in memory are one layer, the head and the
part's hidden states, besides the result.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilemma.model.blocks import make_norm
from trilemma.model.decoder import DecoderLayer, layer_from_model
from trilemma.model.model import Model
from trilemma.techniques.calibration import calibration_tokens, embed, shares, side_by_side
from trilemma.techniques.technique import Build, report
from trilemma.techniques.vocabulary_guide import VocabularyGuide

_PART_BYTES = 512 << 20  # of hidden states that wait for their way back
_HEAD_ROWS = 256

Moments = dict[str, Tensor]
"""Matrix -> E[g g^T] in blocks along the diagonal, (blocks, rows, rows); the last block is filled with zeros."""


@dataclass(frozen=True)
class OutputGuide:
    """What output errors cost: of matrices inside layers, and of the vocabulary's rows."""

    moments: Moments
    vocabulary: VocabularyGuide


def guide_outputs(model: Model, build: Build, block: int) -> OutputGuide:
    """Moments in blocks of at most `block` outputs, which lie in even shares.

    `build.calibration` holds the windows; the same seed and threads give the same bits.

    Raises:
        RecipeError: windows that can not be used, as in `calibrate_layers`.
    """
    tokens = calibration_tokens(model, build)
    config = model.config
    state_bytes = 4 * tokens.shape[1] * config.dim * (len(config.layers) + 1)
    step = max(1, _PART_BYTES // state_bytes)
    found: Moments = {}
    vocabulary = VocabularyGuide(config.vocab_size, config.dim, build.device)
    for first in range(0, len(tokens), step):
        report(build, 0, len(config.layers), f"gradients of windows from {first + 1} of {len(tokens)}")
        numbers = range(first, min(first + step, len(tokens)))
        states = [embed(model, tokens[first : numbers[-1] + 1]).to(build.device)]
        for index in range(len(config.layers)):
            states.append(_forward(layer_from_model(model, index, device=build.device), states[-1], build))
        gradient = _head_gradient(model, states.pop(), numbers, build, vocabulary)
        for index in reversed(range(len(config.layers))):
            layer = layer_from_model(model, index, device=build.device)
            for name, moment in _backward(layer, index, states.pop(), gradient, build, block).items():
                found[name] = found[name] + moment if name in found else moment
        vocabulary.read_entering(gradient * config.embedding_scale)
    return OutputGuide({name: moment / tokens.numel() for name, moment in found.items()}, vocabulary)


def block_size(rows: int, block: int) -> int:
    """Outputs of each block: even shares of `rows`, at most `block`."""
    return -(-rows // -(-rows // block))


def _forward(layer: DecoderLayer, x: Tensor, build: Build) -> Tensor:
    out = torch.empty_like(x)

    def forward(share: list[slice]) -> None:
        for batch in share:
            out[batch] = layer(x[batch])

    side_by_side(forward, shares(x, build), build.threads)
    return out


def _head_gradient(model: Model, x: Tensor, numbers: range, build: Build, vocabulary: VocabularyGuide) -> Tensor:
    """d log p(y) / dx of tokens y that the model draws, for the last layer's output x (windows, context, dim)."""
    norm = make_norm(model.config).to(build.device).requires_grad_(False)
    for name, parameter in norm.named_parameters():
        parameter.copy_(torch.from_numpy(model.tensor(f"final_norm.{name}")))
    head = torch.from_numpy(model.tensor("embedding.weight" if model.config.tied else "head.weight")).to(build.device)
    gradient = torch.empty_like(x)

    def window(at: int) -> None:
        generator = torch.Generator().manual_seed(build.seed * 1_000_003 + numbers[at])
        with torch.enable_grad():
            entering = x[at].clone().requires_grad_()
            normed = norm(entering)
        wanted = torch.empty_like(normed)
        for first in range(0, len(normed), _HEAD_ROWS):
            rows = slice(first, first + _HEAD_ROWS)
            chances = (normed[rows].detach() @ head.T).softmax(-1)
            drawn = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(head.device)
            wanted[rows] = head[drawn] - chances @ head
        normed.backward(wanted)
        assert entering.grad is not None
        gradient[at] = entering.grad

    side_by_side(window, range(len(x)), build.threads)
    for entering in x:
        vocabulary.read_answers(norm(entering), head, build.threads)
    return gradient


def _backward(layer: DecoderLayer, index: int, x: Tensor, gradient: Tensor, build: Build, block: int) -> Moments:
    """Sums of g g^T of the layer's matrices; `gradient` becomes that of the layer's input."""
    layer.requires_grad_(False)
    mine = threading.local()
    linears = {
        f"layers.{index}.{path}.weight": each for path, each in layer.named_modules() if isinstance(each, nn.Linear)
    }

    def watch(name: str, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda g: _add_blocks(mine.moments[name], g.reshape(-1, g.shape[-1])))  # type: ignore[no-untyped-call]

    for name, linear in linears.items():
        linear.register_forward_hook(lambda _, __, out, name=name: watch(name, out))

    def backward(share: list[slice]) -> Moments:
        mine.moments = {name: _empty(linear.out_features, block, x.device) for name, linear in linears.items()}
        for batch in share:
            with torch.enable_grad():
                entering = x[batch].clone().requires_grad_()
                layer(entering).backward(gradient[batch])
            assert entering.grad is not None
            gradient[batch] = entering.grad
        return dict(mine.moments)

    first, *others = side_by_side(backward, shares(x, build), build.threads)
    for name in first:
        for other in others:
            first[name] += other[name]
    return first


def _empty(rows: int, block: int, device: torch.device) -> Tensor:
    size = block_size(rows, block)
    return torch.zeros(-(-rows // size), size, size, device=device)


def _add_blocks(moments: Tensor, g: Tensor) -> None:
    blocks, size, _ = moments.shape
    padded = nn.functional.pad(g, (0, blocks * size - g.shape[1])).reshape(len(g), blocks, size).transpose(0, 1)
    moments.baddbmm_(padded.transpose(1, 2), padded)
