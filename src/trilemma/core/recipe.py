"""The full, ordered settings that turn a checkpoint into an artifact; YAML in and out; hashable.

What a step's settings mean is the technique's business; here they are plain values. Replaying a
recipe on the same host and versions gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from trilemma.core.errors import RecipeError
from trilemma.core.record import Record

RECIPE_VERSION = 1


class Step(Record):
    """One technique with its settings."""

    technique: str
    settings: dict[str, Any] = {}


class Calibration(Record):
    """Which calibration text a recipe saw, so that the same files give the same tokens again.

    part: 'all' of the text, the 'calibrate' part of its split into three, or 'train', all but what `distill` held
    out; weights: of the files, in their order, None: they were read as one text; sha256: of the tokens.
    """

    part: Literal["all", "calibrate", "train"] = "all"
    windows: int
    context: int
    seed: int = 0
    prepare: Literal["none", "book"] = "none"
    weights: tuple[float, ...] | None = None
    sha256: str


class Recipe(Record):
    """Ordered steps. `name` is the scheme or a short label; it takes no part in the hash."""

    version: int = RECIPE_VERSION
    name: str = ""
    seed: int = 0
    steps: tuple[Step, ...] = ()
    calibration: Calibration | None = None

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 over what decides the bytes (all but the name)."""
        decides = self.model_dump(exclude={"name"}, exclude_none=True)
        payload = json.dumps(decides, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(payload.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: not YAML, unknown keys, or a version that this release can not read.
        """
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"The recipe is not valid YAML: {error}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"The recipe must be a mapping with 'version' and 'steps', not {type(data).__name__}.")
        if data.get("version", RECIPE_VERSION) != RECIPE_VERSION:
            raise RecipeError(
                f"The recipe has version {data.get('version')!r}; this release reads version {RECIPE_VERSION}. "
                "Make it anew, or use the release that wrote it."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(f"The recipe can not be read: {explain(error)}") from None

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """The recipe in a YAML file. Raises RecipeError when it can not be read or used."""
        try:
            return cls.from_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise RecipeError(f"Can not read the recipe '{path}': {why}. Give a recipe.yaml.") from None


def explain(error: ValidationError) -> str:
    """A pydantic error as one line of ours: where, what, and the value that was given."""
    parts = []
    for item in error.errors():
        where = ".".join(str(place) for place in item["loc"]) or "value"
        given = repr(item.get("input"))
        parts.append(f"{where}: {item['msg']} (got {given if len(given) <= 80 else given[:80] + '...'})")
    return "; ".join(parts)
