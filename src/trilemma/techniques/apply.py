"""Recipes put to work: every step is checked before any work starts, then applied in order."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.core.environment import cpu_name, usable_cores
from trilemma.core.errors import RecipeError, UnsupportedModelError
from trilemma.core.measurement import Measurement
from trilemma.core.payback import Payback
from trilemma.core.recipe import Recipe
from trilemma.core.record import Record
from trilemma.data.documents import Prepare
from trilemma.formats.artifact import check_output, load_any, read_artifact, weights_bytes, write_artifact
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Model
from trilemma.model.write import model_hash
from trilemma.techniques import TECHNIQUES
from trilemma.techniques.calibration_text import read_calibration
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.stored import has_packed_layers
from trilemma.techniques.technique import Build, Foreseeable, Technique, TechniqueSettings, read_settings
from trilemma.techniques.torch_device import check_device, within_memory

Progress = Callable[[int, int, str], None]


class CompressResult(Record):
    """What `compress` left behind.

    build: `build_s` and `build_energy_j`; payback: after how many output tokens they are repaid, when that was
    asked for; notes: how the recipe was found. They are filled in above this room, where things are measured.
    """

    path: str
    recipe: Recipe
    weights_bytes: int
    original_weights_bytes: int
    seconds: float
    build: dict[str, Measurement] = {}
    payback: tuple[Payback, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.weights_bytes / max(1, self.original_weights_bytes)
        label = self.recipe.name or self.recipe.hash
        return f"{label}, weights {self.weights_bytes / 1e6:.2f} MB ({share:.0%} of the original), {self.seconds:.1f} s"


def check_recipe(recipe: Recipe, config: DecoderConfig) -> list[tuple[Technique, TechniqueSettings]]:
    """Every step as (technique, validated settings), checked against the shapes that the steps before it leave.

    Raises:
        RecipeError: a step's settings are wrong, or do not fit these shapes.
        UnknownNameError: a technique that no table lists.
        UnsupportedModelError: a technique that can not work on this model.
    """
    steps = []
    for step in recipe.steps:
        technique = TECHNIQUES.get(step.technique)()
        settings = read_settings(technique, step.settings)
        reason = technique.supports(config)
        if reason is not None:
            raise UnsupportedModelError(f"The technique '{step.technique}' can not be used on this model: {reason}.")
        steps.append((technique, settings))
        if isinstance(technique, Foreseeable):
            config = technique.config_after(config, settings)
    return steps


def needs_calibration(recipe: Recipe, config: DecoderConfig) -> bool:
    """Whether some step looks at calibration text."""
    return any(technique.needs_calibration(settings) for technique, settings in check_recipe(recipe, config))


def apply_recipe(model: Model, recipe: Recipe, build: Build) -> Model:
    """The model that the recipe makes of `model`, which stays as it is.

    Raises:
        RecipeError: wrong settings, or a step needs calibration text and `build` has none.
        UnsupportedModelError: a technique that can not work on this model.
        InputError: the device has too little memory.
    """
    steps = check_recipe(recipe, model.config)
    for technique, settings in steps:
        if technique.needs_calibration(settings) and (build.calibration is None or not len(build.calibration)):
            raise RecipeError(
                f"The technique '{technique.name}' needs calibration text. Give some with --data (or `data=`), "
                f"or use a scheme that needs none, such as W4A8-g32{' or magnitude50' * (technique.name == 'wanda')}."
            )
    # What steps have in common (what guides them) is made once.
    build = replace(build, original=build.original or model, kept={} if build.kept is None else build.kept)
    keys = (
        _keys(model, recipe, build) if build.work is not None and build.calibration is not None else [""] * len(steps)
    )
    for (technique, settings), key in zip(steps, keys, strict=True):
        if not has_packed_layers(model):
            build = replace(build, unquantized=model)
        with within_memory(build.device, f"the technique '{technique.name}'"):
            model = technique.apply(model, settings, replace(build, key=key))
    return model


def _keys(model: Model, recipe: Recipe, build: Build) -> list[str]:
    """Of every step, 16 hex digits of all that decides what comes out of it."""
    assert build.calibration is not None
    digest = hashlib.sha256(model_hash(model).encode())
    digest.update(f"{build.calibration.shape} {build.calibration.dtype} ".encode())
    digest.update(np.ascontiguousarray(build.calibration).data)
    digest.update(
        f"{build.seed} {build.threads or usable_cores()} {build.device} {cpu_name()} {version('trilemma')} "
        f"{version('torch')} {np.__version__}".encode()
    )
    keys = []
    for step in recipe.steps:
        digest.update(step.model_dump_json().encode())
        keys.append(digest.hexdigest()[:16])
    return keys


def build_artifact(model: Model, recipe: Recipe, output: str | Path, build: Build) -> Model:
    """Apply a recipe, write the artifact, and open it again; `output` is untouched until the end."""
    check_output(output, force=True)
    write_artifact(apply_recipe(model, recipe, build), output, recipe)
    return read_artifact(output)


def compress(
    model: Model | str | Path,
    output: str | Path,
    *,
    scheme: str | None = None,
    recipe: Recipe | str | Path | None = None,
    calibration: NDArray[np.int32] | None = None,
    data: Sequence[str | Path] | None = None,
    prepare: Prepare = "none",
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> CompressResult:
    """Apply one scheme or recipe, without a search, and write the artifact.

    Args:
        recipe: a Recipe, or the path of a recipe.yaml (its own seed holds).
        device: where torch computes: cpu, cuda, cuda:1; rounding differs between them, so do a few codes.
        calibration: token windows (n, context); or give `data`, text files to cut them from.
        prepare: 'book' or 'none', see `data.read_documents`; a recipe that says how is followed.
        force: replace an artifact that is there already.

    A step that trains keeps its checkpoint in `<output>.work` until the artifact is written, and one that quantizes
    on calibration text its finished layers: when it is stopped, the same call goes on from there.

    Raises:
        StoppedError: the user stopped a step that trains.
        InputError: no such device here.
        RecipeError: neither or both of scheme and recipe, or one that can not be used.
        OutputError: the output is taken or can not be written.
        DataError: the texts can not be used.
    """
    start = time.monotonic()
    check_device(device)
    check_output(output, force=force)
    chosen = _choose(scheme, recipe, seed)
    opened = model if isinstance(model, Model) else load_any(model)
    if calibration is None and data and needs_calibration(chosen, opened.config):
        calibration, record = read_calibration(opened, data, chosen.seed, record=chosen.calibration, prepare=prepare)
        chosen = chosen.model_copy(update={"calibration": record})
    work = Path(output).with_name(Path(output).name + ".work")
    build = Build(calibration, chosen.seed, threads, device, work=work, progress=progress)
    made = build_artifact(opened, chosen, output, build)
    shutil.rmtree(work, ignore_errors=True)
    return CompressResult(
        path=str(output), recipe=chosen, weights_bytes=weights_bytes(made),
        original_weights_bytes=weights_bytes(opened), seconds=time.monotonic() - start,
    )  # fmt: skip


def _choose(scheme: str | None, recipe: Recipe | str | Path | None, seed: int) -> Recipe:
    if (scheme is None) == (recipe is None):
        raise RecipeError("Give one of a scheme (for example W4A8-g32-gptq) and a recipe (a recipe.yaml).")
    if scheme is not None:
        return scheme_to_recipe(scheme, seed=seed)
    if isinstance(recipe, Recipe):
        return recipe
    assert recipe is not None
    return Recipe.read(recipe)
