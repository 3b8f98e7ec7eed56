"""The one loop that shows a model its calibration text, a layer at a time, in bounded memory.

For each layer: run all windows through it and gather statistics of what enters its matrices, let
the technique replace matrices, run the windows again through the changed layer, and hand its
output to the next one. So every layer is calibrated on what the compressed layers before it really
produce. In memory are one layer, its statistics and a batch of windows; the hidden states of all of
them lie in a file, and so do finished layers where there is a work folder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trilemma.core.errors import RecipeError
from trilemma.model.decoder import layer_from_model
from trilemma.model.model import Float32, LinearRun, Model, StoredMatrix
from trilemma.techniques.gather import Gram, advance, gather, input_groups
from trilemma.techniques.products import ACTIVATION_GROUP, round_activations
from trilemma.techniques.stored import row_reader
from trilemma.techniques.technique import Build, report
from trilemma.techniques.threads import side_by_side
from trilemma.techniques.walk_folder import WalkFolder

__all__ = [
    "ACTIVATION_GROUP",
    "Change",
    "Gram",
    "calibrate_layers",
    "calibration_tokens",
    "embed",
    "embedder",
    "input_groups",
    "round_activations",
    "side_by_side",
    "walk_layers",
]

Change = Callable[[Model, int, Mapping[str, Gram]], Model]
Replace = Callable[[Mapping[str, Gram]], Mapping[str, Float32 | StoredMatrix]]


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

    return walk_layers(model, build, [change], runs=runs, kept=True)


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
    kept: bool = False,
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
        kept: changes give new tensors alone, and these depend on nothing but their arguments: finished layers may be
            kept in the work folder, and are not changed again by a run that goes on from there.

    Raises:
        RecipeError: as `calibrate_layers`.
        CheckpointError: the work folder is damaged.
    """
    runs = runs or {}
    tokens = calibration_tokens(model, build)
    every = max(1, tokens.numel() // sample) if sample else 0
    total = len(model.config.layers)
    with WalkFolder(build, (*tokens.shape, model.config.dim), kept=kept) as folder:
        model = folder.resumed(model)
        hidden = folder.states("hidden", lambda: embedder(model, tokens))
        for index in range(folder.finished, total):
            before = model
            for change in changes:
                report(build, index, total, f"layer {index}: reading activations")
                layer = layer_from_model(model, index, device=build.device)
                grams = gather(layer, index, model.config, hidden, runs, build, roles, every)
                del layer
                report(build, index, total, f"layer {index}: {what}")
                model = change(model, index, grams)
                del grams
            if index + 1 < total or after is not None:
                report(build, index, total, f"layer {index}: handing on")
                layer, entering = layer_from_model(model, index, device=build.device), hidden
                hidden = folder.fresh("hidden", f"{index}")
                advance(layer, index, entering, hidden, runs, build)
                del layer
            if after is not None:
                after(index, hidden[:])
            model = folder.finish(index, before, model, {"hidden": hidden})
    report(build, total, total, "layers done")
    return model


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
    """What enters the first layer (windows, context, dim), as `Decoder.embed`."""
    return embedder(model, windows)(slice(None))


def embedder(model: Model, windows: Tensor) -> Callable[[slice], Tensor]:
    """The same of a batch of the windows; of the embedding, only the rows in use become f32."""
    rows = row_reader(model.stored("embedding.weight"))

    def enter(batch: slice) -> Tensor:
        tokens = windows[batch]
        values = torch.from_numpy(rows(tokens.reshape(-1).numpy())).reshape(*tokens.shape, -1)
        hidden = values * model.config.embedding_scale
        if not model.config.learned_positions:
            return hidden
        return hidden + torch.from_numpy(model.tensor("position.weight")[: windows.shape[1]])

    return enter
