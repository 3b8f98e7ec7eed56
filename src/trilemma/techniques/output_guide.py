"""How far the model's answers move with each output of each matrix: E[g g^T], g the gradient at the outputs.

g is that of the log-probability of a token which the model itself draws at every position, so the mean is the Fisher
matrix: for small errors e of a matrix's outputs the KL divergence of the model's answers grows by e^T E[g g^T] e / 2.
Tseng et al., "Model-Preserving Adaptive Rounding", 2025 (arXiv:2505.22988), sketch B without its input weights.

Embedding and head are rows of a vocabulary: `vocabulary_guide.py`.

The windows go through in parts, forwards and back a layer at a time. In memory are one layer, or the head, and what
a batch of windows needs; the hidden states of a part and the result lie in files. With a work folder, a run that was
killed goes on behind the last part that was done.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from trilemma.core.errors import CheckpointError
from trilemma.core.files import write_whole
from trilemma.core.record import Record
from trilemma.model.blocks import make_norm
from trilemma.model.decoder import DecoderLayer, layer_from_model
from trilemma.model.model import Model
from trilemma.techniques.calibration import calibration_tokens, embedder
from trilemma.techniques.states import Shape, States, written
from trilemma.techniques.technique import Build, report
from trilemma.techniques.threads import Task, by_batches, side_by_side
from trilemma.techniques.vocabulary_guide import VocabularyGuide
from trilemma.techniques.walk_folder import kept_folder

_PART_BYTES = 2 << 30  # of hidden states that wait on disk for their way back
_HEAD_ROWS = 256
_HEAD_VALUES = 1 << 23  # logits of one thread


class Moments(Mapping[str, Tensor]):
    """Matrix -> E[g g^T] in blocks along the diagonal, (blocks, rows, rows), the last block filled with zeros.

    They lie in a folder as sums over the tokens of `windows` windows.
    """

    def __init__(self, folder: Path, *, temporary: bool = False) -> None:
        self._folder = folder
        if temporary:  # it goes when nobody needs this any more
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.windows, self._tokens = 0, 0
        try:
            done = _Done.model_validate_json((folder / "done.json").read_bytes())
            self.windows, self._tokens = done.windows, done.tokens
        except FileNotFoundError:
            pass
        except (OSError, ValidationError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"'{folder}' is damaged ({reason}). Delete it to begin again.") from None

    def __getitem__(self, name: str) -> Tensor:
        return self.sums(name) / self._tokens

    @property
    def place(self) -> Path:
        """The folder of what is done."""
        return self._folder / str(self.windows)

    def place_of(self, windows: int) -> Path:
        """The folder for what will be done with so many windows."""
        folder = self._folder / str(windows)
        with written(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.place.glob("layers.*.npy")))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def sums(self, name: str) -> Tensor:
        path = self.place / f"{name}.npy"
        try:
            return torch.from_numpy(np.load(path))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"'{path}' is damaged ({error}). Delete '{self._folder}' to begin again.") from None

    def add(self, name: str, sums: Tensor, windows: int) -> None:
        """Sums of a matrix over windows behind those that are done, `windows` with them."""
        total = sums + self.sums(name).to(sums) if self.windows else sums
        folder = self.place_of(windows)
        with written(folder):
            np.save(folder / f"{name}.npy", total.cpu().numpy())

    def finish(self, windows: int, tokens: int) -> None:
        """All matrices have what so many windows add."""
        write_whole(self._folder / "done.json", _Done(windows=windows, tokens=tokens).model_dump_json() + "\n")
        shutil.rmtree(self.place, ignore_errors=True)
        self.windows, self._tokens = windows, tokens


class _Done(Record):
    windows: int
    tokens: int


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
        CheckpointError: the work folder is damaged.
    """
    tokens = calibration_tokens(model, build)
    config = model.config
    kept = kept_folder(build, "guide")
    folder = kept or Path(tempfile.mkdtemp(prefix="trilemma-guide-"))
    guide = OutputGuide(
        Moments(folder, temporary=kept is None), VocabularyGuide(config.vocab_size, config.dim, build.device)
    )
    if guide.moments.windows:
        guide.vocabulary.load(guide.moments.place)
    step = max(1, _PART_BYTES // (4 * tokens.shape[1] * config.dim * (len(config.layers) + 1)))
    for first in range(guide.moments.windows, len(tokens), step):
        report(build, first, len(tokens), f"gradients of windows from {first + 1} of {len(tokens)}")
        _part(model, tokens, range(first, min(first + step, len(tokens))), build, block, guide, folder)
    return guide


def _part(
    model: Model, tokens: Tensor, numbers: range, build: Build, block: int, guide: OutputGuide, folder: Path
) -> None:
    """Add what some windows give to the guide."""
    config, last = model.config, numbers[-1] + 1
    shape: Shape = (len(numbers), tokens.shape[1], config.dim)
    states = [States(folder / f"{at}.f32", shape, build.device).create() for at in range(len(config.layers) + 1)]
    _each(states[0], build, embedder(model, tokens[numbers[0] : last]))
    for index in range(len(config.layers)):
        layer = layer_from_model(model, index, device=build.device)
        _each(states[index + 1], build, partial(_through, layer, states[index]))
    _head_gradient(model, states[-1], numbers, build, guide.vocabulary)
    gradient = states.pop()
    for index in reversed(range(len(config.layers))):
        layer, before = layer_from_model(model, index, device=build.device), states.pop()
        for name, moment in _backward(layer, index, before, gradient, build, block).items():
            guide.moments.add(name, moment, last)
        before.path.unlink()
    for at in range(len(numbers)):
        guide.vocabulary.read_entering(gradient[at : at + 1] * config.embedding_scale)
    gradient.path.unlink()
    guide.vocabulary.save(guide.moments.place_of(last))
    guide.moments.finish(last, last * tokens.shape[1])


def _through(layer: DecoderLayer, before: States, batch: slice) -> Tensor:
    out: Tensor = layer(before[batch])
    return out


def _each(target: States, build: Build, make: Callable[[slice], Tensor]) -> None:
    def fill(batch: slice) -> Sequence[Task]:
        target[batch] = make(batch)
        return ()

    by_batches(fill, *target.shape[:2], build.threads)


def block_size(rows: int, block: int) -> int:
    """Outputs of each block: even shares of `rows`, at most `block`."""
    return -(-rows // -(-rows // block))


def _head_gradient(model: Model, states: States, numbers: range, build: Build, vocabulary: VocabularyGuide) -> None:
    """Put d log p(y) / dx of tokens y that the model draws in the place of the last layer's output x."""
    norm = make_norm(model.config).to(build.device).requires_grad_(False)
    for name, parameter in norm.named_parameters():
        parameter.copy_(torch.from_numpy(model.tensor(f"final_norm.{name}")))
    head = torch.from_numpy(model.tensor("embedding.weight" if model.config.tied else "head.weight")).to(build.device)
    for at in range(len(numbers)):
        vocabulary.read_answers(norm(states[at : at + 1][0]), head, build.threads)
    step = max(16, min(_HEAD_ROWS, _HEAD_VALUES // len(head)))

    def window(at: int) -> None:
        generator = torch.Generator().manual_seed(build.seed * 1_000_003 + numbers[at])
        with torch.enable_grad():
            entering = states[at : at + 1][0].requires_grad_()
            normed = norm(entering)
        wanted = torch.empty_like(normed)
        for first in range(0, len(normed), step):
            rows = slice(first, first + step)
            chances = (normed[rows].detach() @ head.T).softmax(-1)
            drawn = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(head.device)
            wanted[rows] = head[drawn] - chances @ head
        normed.backward(wanted)
        assert entering.grad is not None
        states[at : at + 1] = entering.grad[None]

    side_by_side(window, range(len(numbers)), build.threads)


def _backward(
    layer: DecoderLayer, index: int, before: States, gradient: States, build: Build, block: int
) -> dict[str, Tensor]:
    """Sums of g g^T of the layer's matrices; `gradient` becomes that of the layer's input."""
    layer.requires_grad_(False)
    mine = threading.local()
    linears = {
        f"layers.{index}.{path}.weight": each for path, each in layer.named_modules() if isinstance(each, nn.Linear)
    }
    moments = {name: _empty(linear.out_features, block, torch.device(build.device)) for name, linear in linears.items()}

    def keep(seen: dict[str, Tensor], name: str, gradient: Tensor) -> None:
        seen[name] = gradient.reshape(-1, gradient.shape[-1])

    def watch(name: str, out: Tensor) -> None:
        if out.requires_grad:  # on a GPU autograd goes backward in a thread of its own, where `mine` is another
            out.register_hook(partial(keep, mine.seen, name))  # type: ignore[no-untyped-call]

    for name, linear in linears.items():
        linear.register_forward_hook(lambda _, __, out, name=name: watch(name, out))

    def backward(batch: slice) -> Sequence[Task]:
        mine.seen = {}
        with torch.enable_grad():
            entering = before[batch].requires_grad_()
            layer(entering).backward(gradient[batch])
        assert entering.grad is not None
        gradient[batch] = entering.grad
        seen, mine.seen = mine.seen, {}
        return [partial(_add_blocks, moment, seen.get(name)) for name, moment in moments.items()]

    by_batches(backward, *before.shape[:2], build.threads)
    return moments


def _empty(rows: int, block: int, device: torch.device) -> Tensor:
    size = block_size(rows, block)
    return torch.zeros(-(-rows // size), size, size, device=device)


def _add_blocks(moments: Tensor, g: Tensor | None) -> None:
    if g is None:  # an expert that no token chose
        return
    blocks, size, _ = moments.shape
    padded = nn.functional.pad(g, (0, blocks * size - g.shape[1])).reshape(len(g), blocks, size).transpose(0, 1)
    moments.baddbmm_(padded.transpose(1, 2), padded)
