"""The one loop that shows a model its calibration text, a layer at a time, in bounded memory.

For each layer: run all windows through it and gather statistics of what enters its matrices, let
the technique replace matrices, run the windows again through the changed layer, and hand its
output to the next one. So every layer is calibrated on what the compressed layers before it really
produce. In memory are one layer, its statistics and the hidden states of the windows.

Windows are shared out among threads that each compute alone: at these sizes, threads that share
every single operation wait for each other more than they compute, above all on a busy machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from trilemma.core.environment import usable_cores
from trilemma.core.errors import RecipeError
from trilemma.model.config import DecoderConfig
from trilemma.model.decoder import DecoderLayer, layer_from_model
from trilemma.model.model import Float32, LinearRun, Model, StoredMatrix
from trilemma.techniques.technique import Build, report

_BATCH_TOKENS = 512  # a layer's activations then stay in cache; larger batches were 3 times slower
_MOST_SHARES = 4  # each has statistics of its own, so more would cost memory
MOST_GRAM_BYTES = 2 << 30  # of all shares together: a layer with many experts has many matrices of statistics
ACTIVATION_GROUP = 32
_INPUTS = {**dict.fromkeys(("q", "k", "v", "gate", "up", "router"), "in"), "o": "o", "down": "down"}

Item = TypeVar("Item")
Result = TypeVar("Result")
Change = Callable[[Model, int, Mapping[str, "Gram"]], Model]
Replace = Callable[[Mapping[str, "Gram"]], Mapping[str, Float32 | StoredMatrix]]


class Gram:
    """X^T X of all inputs (tokens, in) that a matrix saw, how many there were, their sum and largest |x| by column.

    every: keep each so-many-th input in `rows` too; 0 keeps none.
    """

    def __init__(self, columns: int, device: str | torch.device = "cpu", every: int = 0) -> None:
        self.matrix = torch.zeros(columns, columns, device=device)
        self.largest = torch.zeros(columns, device=device)
        self.total = torch.zeros(columns, device=device)
        self.tokens = 0
        self.every, self._kept = every, list[Tensor]()

    @property
    def rows(self) -> Tensor:
        """The inputs that were kept, (rows, in)."""
        return torch.cat(self._kept) if self._kept else self.matrix[:0]

    def update(self, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        self.matrix.addmm_(flat.T, flat)
        if len(flat):
            low, high = torch.aminmax(flat, dim=0)
            self.largest = torch.maximum(self.largest, torch.maximum(high, -low))
            self.total += flat.sum(0)
        if self.every:
            self._kept.append(flat[:: self.every].clone())
        self.tokens += flat.shape[0]

    def add(self, other: Gram) -> None:
        self.matrix += other.matrix
        self.total += other.total
        self.largest = torch.maximum(self.largest, other.largest)
        self.tokens += other.tokens
        self._kept += other._kept

    def hessian(self) -> Tensor:
        """H = 2 X^T X / tokens, (in, in): of the mean squared output error of one row."""
        return self.matrix * (2.0 / max(1, self.tokens))


def calibrate_layers(model: Model, build: Build, runs: Mapping[str, LinearRun], replace: Replace) -> Model:
    """Walk the layers; `replace` gets the Gram of every matrix of one layer and returns what to put in.

    Args:
        build: `calibration` holds the windows, (n, context) int32.
        runs: input precision of each product; where it is int8, inputs are rounded so here too.

    Returns:
        The model with everything that `replace` gave put in.

    Raises:
        RecipeError: no windows, a token outside the vocabulary, or activations that are not finite.
    """

    def change(model: Model, _: int, grams: Mapping[str, Gram]) -> Model:
        return model.with_tensors(replace(grams))

    return walk_layers(model, build, [change], runs=runs)


def walk_layers(
    model: Model,
    build: Build,
    changes: Sequence[Change],
    *,
    runs: Mapping[str, LinearRun] | None = None,
    roles: Collection[str] | None = None,
    after: Callable[[int, Tensor], None] | None = None,
    sample: int = 0,
    what: str = "choosing codes",
) -> Model:
    """The loop behind `calibrate_layers`, for changes that may give a layer another shape.

    Args:
        changes: each gets (model, layer, Grams of the layer as the change before left it) and returns a model
            that differs in this layer alone.
        runs: input precision of each product; none rounds no input.
        roles: gather statistics of these matrices only, such as {'o', 'down'}.
        after: called with each layer's number and what the changed layer puts out, (windows, context, dim).
        sample: about so many inputs of each matrix are kept in its Gram's `rows`, spread over the text.
        what: said with the progress while a layer is changed.

    Raises:
        RecipeError: as `calibrate_layers`.
    """
    runs = runs or {}
    hidden = embed(model, calibration_tokens(model, build)).to(build.device)  # (windows, context, dim)
    every = max(1, hidden.shape[0] * hidden.shape[1] // sample) if sample else 0
    total = len(model.config.layers)
    for index in range(total):
        for change in changes:
            report(build, index, total, f"layer {index}: reading activations")
            layer = layer_from_model(model, index, device=build.device)
            grams = _gather(layer, index, model.config, hidden, runs, build, roles, every)
            report(build, index, total, f"layer {index}: {what}")
            model = change(model, index, grams)
        if index + 1 < total or after is not None:
            _advance(layer_from_model(model, index, device=build.device), index, hidden, runs, build)
        if after is not None:
            after(index, hidden)
    report(build, total, total, "layers done")
    return model


def input_groups(config: DecoderConfig, index: int) -> list[tuple[str, ...]]:
    """Matrices of a layer that see the same input, in order of execution: (q, k, v), (o), (gate, up), (down).

    Of experts, (router, shared gate, shared up), (shared down), then each expert's (gate, up) and (down): its
    inputs are those of the tokens that chose it, and may be none.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in config.linear_names():
        if name.startswith(f"layers.{index}."):
            block, role = name.removesuffix(".weight").rsplit(".", 1)
            kind = _INPUTS[role]
            if kind == "in":
                block = block.removesuffix(".shared")  # the shared block reads what the router reads
            groups.setdefault((block, kind), []).append(name)
    return [tuple(group) for group in groups.values()]


def round_activations(x: Tensor, group: int = ACTIVATION_GROUP) -> Tensor:
    """x (..., in) rounded to int8 in groups along the last dimension, absolute maximum at 127."""
    columns = x.shape[-1]
    padded = nn.functional.pad(x, (0, -columns % group))
    grouped = padded.reshape(*x.shape[:-1], -1, group)
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    scale = torch.maximum(high, -low) / 127
    rounded = (grouped / scale.clamp(min=torch.finfo(scale.dtype).tiny)).round_().mul_(scale)
    whole: Tensor = rounded.reshape(padded.shape)[..., :columns]
    return whole


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], threads: int | None) -> list[Result]:
    """`work` of every item, in order, by so many threads (None: all cores) that compute alone; no gradients."""

    def alone(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    count = threads or usable_cores()
    with _single_threaded(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(alone, items))


@contextmanager
def _single_threaded() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def calibration_tokens(model: Model, build: Build) -> Tensor:
    """The calibration windows (n, context) int64, checked against the model. Raises RecipeError."""
    if build.calibration is None or not build.calibration.size:
        raise RecipeError("This technique needs calibration text. Give some with --data (or `data=`).")
    windows = np.asarray(build.calibration)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= model.config.vocab_size:
        raise RecipeError(
            f"The calibration windows hold token {low if low < 0 else high}; the vocabulary has "
            f"{model.config.vocab_size}. Encode the text with this model's own tokenizer."
        )
    if windows.shape[1] > model.config.max_context:
        raise RecipeError(
            f"The calibration windows have {windows.shape[1]} tokens; "
            f"the model's context is {model.config.max_context}. Cut shorter ones."
        )
    return torch.from_numpy(windows.astype(np.int64))


def embed(model: Model, windows: Tensor) -> Tensor:
    """What enters the first layer (windows, context, dim), as `Decoder.embed`; only the rows in use are kept."""
    used, places = torch.unique(windows, return_inverse=True)
    rows = model.tensor("embedding.weight")[used.numpy()]
    hidden = (torch.from_numpy(rows) * model.config.embedding_scale)[places]
    if not model.config.learned_positions:
        return hidden
    return hidden + torch.from_numpy(model.tensor("position.weight")[: windows.shape[1]])


def shares(hidden: Tensor, build: Build, most: int = _MOST_SHARES) -> list[list[slice]]:
    """Slices of windows that go through a layer together, shared out evenly."""
    step = max(1, _BATCH_TOKENS // hidden.shape[1])
    batches = [slice(first, first + step) for first in range(0, hidden.shape[0], step)]
    count = max(1, min(build.threads or usable_cores(), _MOST_SHARES, most, len(batches)))
    return [batches[share::count] for share in range(count)]


def _gather(
    layer: DecoderLayer,
    index: int,
    config: DecoderConfig,
    hidden: Tensor,
    runs: Mapping[str, LinearRun],
    build: Build,
    roles: Collection[str] | None = None,
    every: int = 0,
) -> dict[str, Gram]:
    """The Gram of every matrix of the layer (in these roles); matrices with the same input share one."""
    groups = [
        group
        for group in input_groups(config, index)
        if roles is None or any(name.split(".")[-2] in roles for name in group)
    ]
    if not groups:
        return {}
    hooks = rounding_hooks(layer, index, runs)
    linears = {group: linear_of(layer, group[-1]) for group in groups}  # the first may be a router, never rounded
    mine = threading.local()
    for group, linear in linears.items():
        hooks.append(linear.register_forward_pre_hook(lambda _, args, group=group: mine.grams[group].update(args[0])))

    def gather(share: list[slice]) -> dict[tuple[str, ...], Gram]:
        mine.grams = {group: Gram(linear.in_features, hidden.device, every) for group, linear in linears.items()}
        for batch in share:
            layer(hidden[batch])
        return dict(mine.grams)

    gram_bytes = sum(4 * linear.in_features**2 for linear in linears.values())
    first, *others = side_by_side(gather, shares(hidden, build, MOST_GRAM_BYTES // gram_bytes), build.threads)
    for hook in hooks:
        hook.remove()
    for group, gram in first.items():
        for other in others:
            gram.add(other[group])
        if not torch.isfinite(gram.matrix).all():
            raise RecipeError(f"The inputs of '{group[0]}' are not finite on the calibration text. Use bf16 here.")
    return {name: gram for group, gram in first.items() for name in group}


def _advance(layer: DecoderLayer, index: int, hidden: Tensor, runs: Mapping[str, LinearRun], build: Build) -> None:
    """Replace the hidden states by the layer's output, in place."""
    rounding_hooks(layer, index, runs)

    def advance(share: list[slice]) -> None:
        for batch in share:
            hidden[batch] = layer(hidden[batch])

    side_by_side(advance, shares(hidden, build), build.threads)


def rounding_hooks(
    layer: DecoderLayer, index: int, runs: Mapping[str, LinearRun]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Let every product whose activations will be int8 see them rounded."""
    hooks = []
    mine = threading.local()  # the input rounded last and its rounding: q, k and v (gate and up) share one

    def rounded(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if getattr(mine, "input", None) is not args[0]:
            mine.input, mine.rounded = args[0], round_activations(args[0])
        return (mine.rounded, *args[1:])

    for path, module in layer.named_modules():
        run = runs.get(f"layers.{index}.{path}.weight")
        if isinstance(module, nn.Linear) and run is not None and run.activation == "int8-g32":
            hooks.append(module.register_forward_pre_hook(rounded))
    return hooks


def linear_of(layer: DecoderLayer, name: str) -> nn.Linear:
    _, _, path = name.removesuffix(".weight").split(".", 2)
    found = layer.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found
