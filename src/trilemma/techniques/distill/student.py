"""`distill`: a student is cut out of the model, then learns from the whole one.

What is cut, and how the rest makes up for it, is the work of `prune`: layers that true KL says are the least
missed (only when asked for), then FFN channels and key-value heads. Width before depth: at the same number of
parameters a shallower student starts and ends farther from its teacher (docs/log.md).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from trilemma.core.errors import RecipeError
from trilemma.model.config import DecoderConfig, Dense
from trilemma.model.model import Model
from trilemma.techniques.distill.heal import HealSettings, Lesson
from trilemma.techniques.distill.windows import pieces
from trilemma.techniques.prune.depth import DepthSettings, PruneDepth
from trilemma.techniques.prune.width import PruneWidth, WidthSettings
from trilemma.techniques.stored import refuse_packed
from trilemma.techniques.technique import Build

CUT_WINDOWS = 32
CUT_CONTEXT = 256
_DEPTH_WINDOWS = 8  # that layers are ranked on
_FLOOR = 0.1  # of each part stays at least: what learns afterwards can do with less than what is only pruned
_CLOSE_ENOUGH = 0.01


class DistillSettings(HealSettings):
    """Settings of `distill`: those of the cut, and how the student learns."""

    shrink: float = Field(0.5, gt=0, lt=1, description="share of the weights inside layers that goes")
    layers: int | None = Field(None, ge=1, description="layers that the student keeps; all by default")
    steps: int = Field(500, ge=1, description="optimizer steps")


class Distill:
    """Cut a student out of the model and let it learn from the whole one."""

    name: ClassVar[str] = "distill"
    what: ClassVar[str] = "cut a smaller student out of the model, then train it to answer like the whole one"
    Settings: ClassVar[type[DistillSettings]] = DistillSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return PruneWidth().supports(config)

    def needs_calibration(self, settings: DistillSettings) -> bool:
        return True

    def config_after(self, config: DecoderConfig, settings: DistillSettings) -> DecoderConfig:
        whole = layer_parameters(config)
        depth = _depth_settings(config, settings.layers)
        if depth is not None:
            config = PruneDepth().config_after(config, depth)
        share = 1 - (1 - settings.shrink) * whole / layer_parameters(config)
        if share < _CLOSE_ENOUGH:
            return config
        return PruneWidth().config_after(config, _width_settings(config, share))

    def exact(self, settings: DistillSettings) -> bool:
        """Which layers lose how much is known only after the cut."""
        return False

    def apply(self, model: Model, settings: DistillSettings, build: Build) -> Model:
        """Raises RecipeError for packed weights, no calibration text, or more than can be cut."""
        student = cut_student(model, settings, build)
        return Lesson(student, build.original or model, settings, build).learn(self.name)


def cut_student(model: Model, settings: DistillSettings, build: Build) -> Model:
    """The student before it has learned anything, stored like the model.

    Raises:
        RecipeError: packed weights, no calibration text, or more than can be cut.
    """
    refuse_packed(model, "distill", "distill first, then compress the student")
    if build.calibration is None or not len(build.calibration):
        raise RecipeError("Cutting a student needs text. Give some with --data (or `data=`).")
    few = replace(build, calibration=pieces(build.calibration[:CUT_WINDOWS], CUT_CONTEXT)[:CUT_WINDOWS])
    whole = layer_parameters(model.config)
    depth = _depth_settings(model.config, settings.layers)
    if depth is not None:
        model = PruneDepth().apply(model, depth, few)
    share = 1 - (1 - settings.shrink) * whole / layer_parameters(model.config)
    if share < -_CLOSE_ENOUGH:
        gone = 1 - layer_parameters(model.config) / whole
        raise RecipeError(
            f"Keeping {settings.layers} layers removes {gone:.0%} already, and {settings.shrink:.0%} was asked for. "
            "Keep more layers or shrink more."
        )
    if share < _CLOSE_ENOUGH:
        return model
    return PruneWidth().apply(model, _width_settings(model.config, share), few)


def _depth_settings(config: DecoderConfig, layers: int | None) -> DepthSettings | None:
    """Layers of different sizes count by their weights. Raises RecipeError for more layers than there are."""
    total = len(config.layers)
    if layers is None or layers == total:
        return None
    if layers > total:
        raise RecipeError(f"The model has {total} layers; {layers} can not be kept.")
    return DepthSettings.model_validate({"share": 1 - layers / total, "windows": _DEPTH_WINDOWS})


def _width_settings(config: DecoderConfig, share: float) -> WidthSettings:
    """Widths stay multiples of 32 where the blocks are wide enough for that to be fine-grained."""
    widths = [layer.ffn.hidden for layer in config.layers if isinstance(layer.ffn, Dense)]
    multiple = max(1, min(32, min(widths, default=32) // 8))
    return WidthSettings.model_validate({"share": share, "floor": _FLOOR, "multiple": multiple})


def layer_parameters(config: DecoderConfig) -> int:
    """Parameters inside of layers; the embedding, the head and the final norm do not count."""
    return sum(math.prod(shape) for name, shape in config.tensor_shapes().items() if name.startswith("layers."))


def all_parameters(config: DecoderConfig) -> int:
    """Parameters of the whole model, each shared one once."""
    return sum(math.prod(shape) for shape in config.tensor_shapes().values())


def describe_cut(before: DecoderConfig, after: DecoderConfig) -> str:
    """'6 layers, FFN 768 -> 288 to 512, key-value heads 4 -> 2 to 3': what the student has of the teacher."""
    parts = [_range("layers", [len(before.layers)], [len(after.layers)])]
    for what, read in (("FFN channels", _hidden), ("key-value heads", _kv_heads)):
        old, new = read(before), read(after)
        if old and new:
            parts.append(_range(what, old, new))
    return ", ".join(parts)


def _hidden(config: DecoderConfig) -> list[int]:
    return [layer.ffn.hidden for layer in config.layers if isinstance(layer.ffn, Dense)]


def _kv_heads(config: DecoderConfig) -> list[int]:
    return [layer.attention.kv_heads for layer in config.layers if layer.attention is not None]


def _range(what: str, old: list[int], new: list[int]) -> str:
    def words(values: list[int]) -> str:
        return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"

    return f"{what} {words(old)}" if old == new else f"{what} {words(old)} -> {words(new)}"
