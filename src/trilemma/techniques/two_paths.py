"""The calibration loop with the unchanged model beside: what each matrix sees in both of them.

A layer is walked in halves, attention and feed-forward, and in stages of matrices that share an input: a stage's
statistics come from this layer's earlier stages as they were replaced. In memory are one layer of both models, its
statistics and a batch of windows; the hidden states of both models lie in files. A half runs twice for the changed
model (less its last product) and once for the unchanged one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from trilemma.model.config import LayerSpec
from trilemma.model.decoder import DecoderLayer, layer_from_model
from trilemma.model.model import Float32, LinearRun, Model, StoredMatrix
from trilemma.techniques.calibration import calibration_tokens, embedder
from trilemma.techniques.gather import (
    Gram,
    Group,
    captured,
    input_groups,
    linear_of,
    refuse_not_finite,
    stripes,
)
from trilemma.techniques.products import prepare_products
from trilemma.techniques.states import States
from trilemma.techniques.technique import Build, report
from trilemma.techniques.threads import Task, by_batches
from trilemma.techniques.walk_folder import WalkFolder

Half = Literal["attention", "ffn"]
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

    def pair_tasks(self, x: Tensor | None, before: Tensor | None, drift: Tensor) -> list[Task]:
        """x, before (..., in): inputs in the changed and the unchanged model, or None; drift (..., out)."""
        flat = self.matrix[:0] if x is None else x.reshape(-1, x.shape[-1]).float()
        found = self.tasks(x)
        if self.cross is not self.matrix:
            found += stripes(self.cross, flat if before is None else before.reshape(flat.shape).float(), flat)
        if self.drift is not None:
            found += stripes(self.drift, drift.reshape(-1, len(self.drift))[: len(flat)].float(), flat)
        return found

    def forget_paths(self) -> None:
        """Let go of what was gathered beside the Gram."""
        self.cross, self.drift = self.matrix, None


Replace = Callable[[Mapping[str, Pair]], Mapping[str, Float32 | StoredMatrix]]


def calibrate_beside(
    model: Model,
    unchanged: Model,
    build: Build,
    runs: Mapping[str, LinearRun],
    replace: Replace,
    *,
    what: str = "choosing codes",
) -> Model:
    """Walk the layers; `replace` gets the Pair of every matrix of one stage and returns what to put in.

    Args:
        model: what is changed; its matrices outside layers may be others than those of `unchanged`.
        build: `calibration` holds the windows, (n, context) int32.
        runs: input precision of each product of the changed model; where it is int8, inputs are rounded so here too.
        what: said with the progress while a stage is changed.

    Raises:
        RecipeError: as `calibrate_layers`.
    """
    tokens = calibration_tokens(model, build)
    total = len(model.config.layers)
    with WalkFolder(build, (*tokens.shape, model.config.dim), kept=True) as folder:
        entered = model
        model = folder.resumed(model)
        walk = _Walk(
            build, runs, folder, folder.states("changed", lambda: embedder(entered, tokens)),
            folder.states("unchanged", lambda: embedder(unchanged, tokens)),
        )  # fmt: skip
        for index in range(folder.finished, total):
            before = model
            walk.enter(index, model.config.layers[index])
            for half, stages in _halves(model, index).items():
                for stage in stages:
                    report(build, index, total, f"layer {index}: reading activations")
                    found = walk.gather(model, unchanged, half, stage, last=stage is stages[-1])
                    report(build, index, total, f"layer {index}: {what}")
                    model = model.with_tensors(replace(found))
                    del found
                report(build, index, total, f"layer {index}: handing on")
                walk.advance(model, half)
            model = folder.finish(index, before, model, {"changed": walk.changed, "unchanged": walk.unchanged})
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


class _Walk:
    """The hidden states of both models, and the layer that they stand before or in."""

    def __init__(
        self, build: Build, runs: Mapping[str, LinearRun], folder: WalkFolder, changed: States, unchanged: States
    ) -> None:
        self.build, self.runs, self.folder = build, runs, folder
        self.changed, self.unchanged = changed, unchanged  # (windows, context, dim)
        self._behind = unchanged  # this half, once its last stage was gathered

    def enter(self, index: int, spec: LayerSpec) -> None:
        parallel = spec.parallel and spec.attention is not None
        self.index, self._entering = index, (self.changed, self.unchanged) if parallel else None

    def gather(self, model: Model, unchanged: Model, half: Half, stage: Stage, *, last: bool) -> dict[str, Pair]:
        """The Pair of every matrix of a stage; the last stage takes the unchanged states through the half."""
        layer, beside = self._layer(model), self._layer(unchanged)
        prepare_products(layer, self.index, self.runs)
        pairs = self._pairs(layer, half, stage)
        if last:
            self._behind = self.folder.fresh("unchanged", f"{self.index}-{half}")
        with captured(layer, stage) as look, captured(beside, stage) as look_beside:

            def gather(batch: slice) -> Sequence[Task]:
                seen_before = look_beside(lambda: self._pass(beside, half, batch, keep=last), stop=not last)
                seen = look(lambda: _through(layer, half, self.changed[batch], self._enter(0, batch)), stop=True)
                drift = self.unchanged[batch] - self.changed[batch]
                return [
                    task
                    for group, pair in pairs.items()
                    for task in pair.pair_tasks(
                        seen.get(group), seen_before[group] if pair.cross is not pair.matrix else None, drift
                    )
                ]

            by_batches(gather, *self.changed.shape[:2], self.build.threads)
        for group, pair in pairs.items():
            pair.close()
            refuse_not_finite(group, pair)
        return {name: pair for group, pair in pairs.items() for name in group}

    def advance(self, model: Model, half: Half) -> None:
        """Take the changed model's states through a half, as the last stage has taken the unchanged ones."""
        layer = self._layer(model)
        prepare_products(layer, self.index, self.runs)
        behind = self.folder.fresh("changed", f"{self.index}-{half}")

        def advance(batch: slice) -> Sequence[Task]:
            behind[batch] = _through(layer, half, self.changed[batch], self._enter(0, batch))
            return ()

        by_batches(advance, *self.changed.shape[:2], self.build.threads)
        self.changed, self.unchanged = behind, self._behind

    def _pass(self, beside: DecoderLayer, half: Half, batch: slice, *, keep: bool) -> None:
        passed = _through(beside, half, self.unchanged[batch], self._enter(1, batch))
        if keep:
            self._behind[batch] = passed

    def _enter(self, which: int, batch: slice) -> Tensor | None:
        """What entered the layer, where its feed-forward half reads that and not the attention's output."""
        return None if self._entering is None else self._entering[which][batch]

    def _layer(self, model: Model) -> DecoderLayer:
        return layer_from_model(model, self.index, device=self.build.device)

    def _pairs(self, layer: DecoderLayer, half: Half, stage: Stage) -> dict[Group, Pair]:
        whole_stream = {"attention": layer.attention_post_norm, "ffn": layer.ffn_post_norm}[half] is None
        return {
            group: Pair(
                linear_of(layer, group[-1]), self.build.device, beside=".experts." not in group[0],
                drifts=whole_stream and group[0].split(".")[-2] in ("o", "down") and ".experts." not in group[0],
            )
            for group in stage
        }  # fmt: skip


def _through(layer: DecoderLayer, half: Half, x: Tensor, entering: Tensor | None) -> Tensor:
    """x (batch, time, dim) behind one half of the layer, as `DecoderLayer.forward` computes it.

    entering: what the feed-forward half reads, where that is not x.
    """
    if half == "attention":
        assert layer.attention is not None
        assert layer.attention_norm is not None
        out = layer.attention(layer.attention_norm(x), torch.arange(x.shape[1], device=x.device))
        post = layer.attention_post_norm
    else:
        assert layer.ffn is not None
        assert layer.ffn_norm is not None
        out, post = layer.ffn(layer.ffn_norm(x if entering is None else entering)), layer.ffn_post_norm
    behind: Tensor = x + (out if post is None else post(out))
    return behind
