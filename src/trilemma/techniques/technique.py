"""What every technique is: a settings record, a predicate, and a function from model to model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from trilemma.core.errors import RecipeError
from trilemma.core.recipe import explain
from trilemma.core.record import Record
from trilemma.model.config import DecoderConfig
from trilemma.model.model import Activation, Model

Kept = TypeVar("Kept")


class TechniqueSettings(Record):
    """Base of every technique's settings; each field carries its one-line help."""


@dataclass(frozen=True)
class Build:
    """What a technique may use while it works.

    calibration: token windows, (n, context) int32, or None when the recipe has no data;
    device: where torch computes, as `torch_device.check_device` gives it;
    original: the model before the recipe's first step (healing learns from it); `apply_recipe` sets it;
    unquantized: the model before its layers were quantized, or None where they came so; `apply_recipe` sets it;
    work: a folder for what a long step needs to resume after an interruption, or None; the model that comes out may
        have tensors that are read from there;
    key: names everything that decides what comes out of this step; `apply_recipe` sets it where there is a work folder;
    kept: what several recipes on the same model, text and seed may share, by name; None: the steps of one share alone;
    progress: called with (done, total, what) now and then.
    """

    calibration: NDArray[np.int32] | None = None
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    original: Model | None = None
    unquantized: Model | None = None
    work: Path | None = None
    key: str = ""
    kept: dict[str, tuple[Model, Any]] | None = None
    progress: Callable[[int, int, str], None] | None = None

    def once(self, name: str, model: Model, make: Callable[[], Kept]) -> Kept:
        """What `make` gives of this very model, from `kept` where it is there."""
        if self.kept is None:
            return make()
        if name not in self.kept or self.kept[name][0] is not model:
            self.kept[name] = model, make()
        found: Kept = self.kept[name][1]
        return found


class Technique(Protocol):
    """Leaves its input unchanged; the same seed, host and threads give the same result."""

    name: ClassVar[str]
    what: ClassVar[str]
    Settings: ClassVar[type[TechniqueSettings]]

    def supports(self, config: DecoderConfig) -> str | None:
        """None when it can work on such a model, else the reason why not."""
        ...

    def needs_calibration(self, settings: Any) -> bool: ...

    def apply(self, model: Model, settings: Any, build: Build) -> Model: ...


@runtime_checkable
class Foreseeable(Protocol):
    """A technique that says which shapes it leaves before it has worked; formats and the KV cache stay as they are.

    Those that quantize are known otherwise (`cost_twin.py`); the rest can not be imitated or predicted.
    """

    def config_after(self, config: DecoderConfig, settings: Any) -> DecoderConfig:
        """The shapes it leaves, or ones of the same cost. Raises RecipeError when the settings do not fit."""
        ...

    def exact(self, settings: Any) -> bool:
        """Whether they are exactly those that it leaves, not just about the same cost."""
        ...


@runtime_checkable
class Remaking(Foreseeable, Protocol):
    """A foreseeable technique that makes new matrices out of the old ones."""

    def origin(self, name: str) -> str | None:
        """The old matrix whose format and input precision the new one keeps; None: it is made anew, in f32."""
        ...


@runtime_checkable
class Adding(Foreseeable, Protocol):
    """A foreseeable technique that puts matrices beside those of the layers."""

    def added(self, settings: Any, inputs: Mapping[str, Activation]) -> dict[str, tuple[str, Activation]]:
        """Their names -> format and input precision, where the products have these `inputs`."""
        ...


def read_settings(technique: Technique, raw: dict[str, Any]) -> TechniqueSettings:
    """Validate a step's settings. Raises RecipeError naming the key, the value and what was expected."""
    try:
        return technique.Settings.model_validate(raw)
    except ValidationError as error:
        valid = ", ".join(technique.Settings.model_fields)
        raise RecipeError(f"Settings of '{technique.name}': {explain(error)}. Keys: {valid}.") from None


def report(build: Build, done: int, total: int, what: str) -> None:
    if build.progress is not None:
        build.progress(done, total, what)


__all__: Sequence[str] = [
    "Adding",
    "Build",
    "Foreseeable",
    "Remaking",
    "Technique",
    "TechniqueSettings",
    "read_settings",
    "report",
]
