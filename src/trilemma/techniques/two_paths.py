"""The calibration loop with the unchanged model beside: what each matrix sees in both of them.

A layer is walked in halves, attention and feed-forward, and in stages of matrices that share an input: a stage's
statistics come from this layer's earlier stages as they were replaced. In memory are one layer of both models, its
statistics and the hidden states of both (windows, context, dim). A half runs twice for the changed model (less its last
product) and once for the unchanged one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor, nn

from trilemma.core.errors import RecipeError
from trilemma.model.decoder import DecoderLayer, layer_from_model
from trilemma.model.model import Float32, LinearRun, Model, StoredMatrix
from trilemma.techniques.calibration import (
    MOST_GRAM_BYTES,
    Gram,
    calibration_tokens,
    embed,
    input_groups,
    linear_of,
    rounding_hooks,
    shares,
    side_by_side,
)
from trilemma.techniques.technique import Build, report

Half = Literal["attention", "ffn"]
Group = tuple[str, ...]
Stage = list[Group]


class Pair(Gram):
    """A Gram of the inputs X~ in the changed model, and beside it

    cross: X^T X~ (in, in), X the inputs in the unchanged model at the same tokens;
    drift: (R - R~)^T X~ (out, in), R the residual stream that the matrix adds to; None where it adds to none.

    Without `beside` (experts see other tokens in each model) cross is X~^T X~.
    """

    def __init__(self, linear: nn.Linear, device: str | torch.device, *, beside: bool, drifts: bool) -> None:
        super().__init__(linear.in_features, device)
        self.cross = torch.zeros_like(self.matrix) if beside else self.matrix
        self.drift = torch.zeros(linear.out_features, linear.in_features, device=device) if drifts else None

    def update_pair(self, x: Tensor, before: Tensor | None, drift: Tensor | None) -> None:
        """x, before (..., in): inputs in the changed and the unchanged model; drift (..., out)."""
        self.update(x)
        flat = x.reshape(-1, x.shape[-1]).float()
        if before is not None:
            self.cross.addmm_(before.reshape(flat.shape).float().T, flat)
        if self.drift is not None and drift is not None:
            self.drift.addmm_(drift.reshape(len(flat), -1).float().T, flat)

    def add_pair(self, other: Pair) -> None:
        self.add(other)
        if self.cross is not self.matrix:
            self.cross += other.cross
        if self.drift is not None and other.drift is not None:
            self.drift += other.drift


Replace = Callable[[Mapping[str, Pair]], Mapping[str, Float32 | StoredMatrix]]


def calibrate_beside(
    model: Model, unchanged: Model, build: Build, runs: Mapping[str, LinearRun], replace: Replace
) -> Model:
    """Walk the layers; `replace` gets the Pair of every matrix of one stage and returns what to put in.

    Args:
        model: what is changed; its matrices outside layers may be others than those of `unchanged`.
        build: `calibration` holds the windows, (n, context) int32.
        runs: input precision of each product of the changed model; where it is int8, inputs are rounded so here too.

    Raises:
        RecipeError: as `calibrate_layers`.
    """
    tokens = calibration_tokens(model, build)
    walk = _Walk(build, runs, embed(model, tokens).to(build.device), embed(unchanged, tokens).to(build.device))
    total = len(model.config.layers)
    for index in range(total):
        beside = layer_from_model(unchanged, index, device=build.device)
        walk.enter(index, beside)
        for half, stages in _halves(model, index).items():
            for stage in stages:
                report(build, index, total, f"layer {index}: reading activations")
                layer = layer_from_model(model, index, device=build.device)
                found = walk.gather(layer, beside, half, stage, last=stage is stages[-1])
                report(build, index, total, f"layer {index}: choosing codes")
                model = model.with_tensors(replace(found))
            walk.advance(layer_from_model(model, index, device=build.device), half)
    report(build, total, total, "layers done")
    return model


def _halves(model: Model, index: int) -> dict[Half, list[Stage]]:
    """Groups of a layer by half and stage, in order of execution: those that read the half's norm, then the others."""
    found: dict[Half, list[Stage]] = {}
    for group in input_groups(model.config, index):
        half: Half = "attention" if group[0].startswith(f"layers.{index}.attention.") else "ffn"
        stages = found.setdefault(half, [[], []])
        stages[group[0].split(".")[-2] in ("o", "down")].append(group)
    return {half: [stage for stage in stages if stage] for half, stages in found.items()}


class _Stop(Exception):  # noqa: N818
    """Nothing behind this product is needed."""


class _Walk:
    """The hidden states of both models, and the layer that they stand before or in."""

    def __init__(self, build: Build, runs: Mapping[str, LinearRun], changed: Tensor, unchanged: Tensor) -> None:
        self.build, self.runs = build, runs
        self.changed, self.unchanged = changed, unchanged  # (windows, context, dim)
        self.index = 0
        self.entering = (changed, unchanged)

    def enter(self, index: int, layer: DecoderLayer) -> None:
        """Remember what enters the layer where its feed-forward half reads that, not the attention's output."""
        self.index = index
        parallel = layer.spec.parallel and layer.attention is not None
        states = (self.changed, self.unchanged)
        self.entering = (states[0].clone(), states[1].clone()) if parallel else states

    def gather(
        self, layer: DecoderLayer, beside: DecoderLayer, half: Half, stage: Stage, *, last: bool
    ) -> dict[str, Pair]:
        """The Pair of every matrix of a stage; after the last stage of a half the unchanged states are behind it."""
        rounding_hooks(layer, self.index, self.runs)
        whole_stream = {"attention": layer.attention_post_norm, "ffn": layer.ffn_post_norm}[half] is None
        linears = {group: linear_of(layer, group[-1]) for group in stage}
        mine = threading.local()

        def fresh() -> dict[Group, Pair]:
            return {
                group: Pair(
                    linear, self.changed.device, beside=".experts." not in group[0],
                    drifts=whole_stream and group[0].split(".")[-2] in ("o", "down") and ".experts." not in group[0],
                )
                for group, linear in linears.items()
            }  # fmt: skip

        def gather(share: list[slice]) -> dict[Group, Pair]:
            pairs = fresh()
            for batch in share:
                drift = self.unchanged[batch] - self.changed[batch]
                mine.seen, mine.stop = {}, not last and len(stage) == 1
                with suppress(_Stop):
                    passed = _through(beside, half, self.unchanged[batch], self.entering[1][batch])
                    if last:
                        self.unchanged[batch] = passed
                before, mine.seen, mine.stop = mine.seen, {}, len(stage) == 1
                with suppress(_Stop):
                    _through(layer, half, self.changed[batch], self.entering[0][batch])
                for group, pair in pairs.items():
                    if group in mine.seen:
                        same = pair.cross is not pair.matrix
                        pair.update_pair(mine.seen[group], before[group] if same else None, drift)
            return pairs

        size = sum(4 * each.in_features * (2 * each.in_features + each.out_features) for each in linears.values())
        with _captured(layer, stage, mine), _captured(beside, stage, mine):
            parts = shares(self.changed, self.build, MOST_GRAM_BYTES // size)
            first, *others = side_by_side(gather, parts, self.build.threads)
        for group, pair in first.items():
            for other in others:
                pair.add_pair(other[group])
            if not torch.isfinite(pair.matrix).all():
                raise RecipeError(f"The inputs of '{group[0]}' are not finite on the calibration text. Use bf16 here.")
        return {name: pair for group, pair in first.items() for name in group}

    def advance(self, layer: DecoderLayer, half: Half) -> None:
        """Take the changed model's states through a half, in place."""
        rounding_hooks(layer, self.index, self.runs)

        def advance(share: list[slice]) -> None:
            for batch in share:
                self.changed[batch] = _through(layer, half, self.changed[batch], self.entering[0][batch])

        side_by_side(advance, shares(self.changed, self.build), self.build.threads)


@contextmanager
def _captured(layer: DecoderLayer, stage: Stage, mine: threading.local) -> Iterator[None]:
    """Let `mine.seen` have what enters each group of the stage, and stop there when `mine.stop` says so."""

    def capture(group: Group, x: Tensor) -> None:
        mine.seen[group] = x
        if mine.stop:
            raise _Stop

    hooks = [
        linear_of(layer, group[-1]).register_forward_pre_hook(lambda _, args, group=group: capture(group, args[0]))
        for group in stage
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _through(layer: DecoderLayer, half: Half, x: Tensor, entering: Tensor) -> Tensor:
    """x (batch, time, dim) behind one half of the layer, as `DecoderLayer.forward` computes it."""
    if half == "attention":
        assert layer.attention is not None
        assert layer.attention_norm is not None
        out = layer.attention(layer.attention_norm(x), torch.arange(x.shape[1], device=x.device))
        post = layer.attention_post_norm
    else:
        assert layer.ffn is not None
        assert layer.ffn_norm is not None
        out, post = layer.ffn(layer.ffn_norm(entering)), layer.ffn_post_norm
    behind: Tensor = x + (out if post is None else post(out))
    return behind
