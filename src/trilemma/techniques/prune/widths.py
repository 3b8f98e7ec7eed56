"""How much each layer loses when a share of the whole must go: the parts that can shrink, and two ways to share out.

Arithmetic on configs and error curves; what is removed inside a part is decided elsewhere (`width.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from trilemma.core.errors import RecipeError
from trilemma.model.config import DecoderConfig, Dense, LayerSpec
from trilemma.techniques.prune.cut import narrow_ffn

Parts = Literal["both", "ffn", "heads"]
HeadUnit = Literal["group", "query"]


@dataclass(frozen=True)
class Slot:
    """One part of a layer and the steps in which it may shrink.

    block: columns of a unit (a channel: 1; a head; a key-value head with its query heads);
    steps: units that go in each step, as many steps as its floor allows;
    unit_parameters: weights that go with one unit; parameters: weights of the whole part.
    """

    layer: int
    part: Literal["attention", "ffn"]
    block: int
    units: int
    steps: tuple[int, ...]
    unit_parameters: int
    parameters: int

    @property
    def matrix(self) -> str:
        """The matrix whose inputs go."""
        return f"layers.{self.layer}.{'attention.o' if self.part == 'attention' else 'ffn.down'}.weight"

    def removed(self, steps: int) -> int:
        """Parameters that are gone after so many steps."""
        return sum(self.steps[:steps]) * self.unit_parameters


def find_slots(config: DecoderConfig, parts: Parts, *, multiple: int, floor: float, head_unit: HeadUnit) -> list[Slot]:
    """Every part that may shrink, in order of execution. Parts made of experts stay as they are."""
    found = []
    for index, layer in enumerate(config.layers):
        if parts != "ffn" and layer.attention is not None:
            found.append(_attention_slot(config.dim, index, layer, floor, head_unit))
        if parts != "heads" and isinstance(layer.ffn, Dense):
            found.append(_ffn_slot(config.dim, index, layer.ffn, floor, multiple))
    return found


def _attention_slot(dim: int, index: int, layer: LayerSpec, floor: float, unit: HeadUnit) -> Slot:
    spec = layer.attention
    assert spec is not None
    each = spec.heads // spec.kv_heads
    parameters = dim * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    if unit == "group":
        steps = (1,) * (spec.kv_heads - _least(spec.kv_heads, floor))
        cost = dim * spec.head_dim * 2 * (each + 1)
        return Slot(index, "attention", each * spec.head_dim, spec.kv_heads, steps, cost, parameters)
    # A step takes one query head from each key-value head, so that all keep the same number.
    steps = (1,) * (each - _least(each, floor))
    cost = dim * spec.head_dim * 2 * spec.kv_heads
    return Slot(index, "attention", spec.head_dim, each, steps, cost, parameters)


def _ffn_slot(dim: int, index: int, spec: Dense, floor: float, multiple: int) -> Slot:
    matrices = 3 if spec.gated else 2
    last = max(multiple, math.ceil(spec.hidden * floor / multiple) * multiple)
    widths = [spec.hidden, *range((spec.hidden - 1) // multiple * multiple, last - 1, -multiple)]
    steps = tuple(wide - narrow for wide, narrow in pairwise(widths))
    return Slot(index, "ffn", 1, spec.hidden, steps, dim * matrices, dim * matrices * spec.hidden)


def _least(units: int, floor: float) -> int:
    return max(1, math.ceil(units * floor))


def spread_evenly(slots: Sequence[Slot], share: float) -> dict[Slot, int]:
    """Steps for each slot such that the share of its units that goes is the nearest possible one."""
    chosen = {}
    for slot in slots:
        wanted = share * slot.units
        chosen[slot] = min(range(len(slot.steps) + 1), key=lambda n, s=slot: abs(sum(s.steps[:n]) - wanted))  # type: ignore[misc]
    return chosen


def spread_by_error(slots: Sequence[Slot], errors: Mapping[Slot, Sequence[float]], share: float) -> dict[Slot, int]:
    """Steps for each slot such that at least `share` of all parameters goes, at the least sum of errors, nearly.

    Args:
        errors: of each slot: its error after 0, 1, 2, ... steps.

    Raises:
        RecipeError: the slots' floors do not allow that much.
    """
    chosen = dict.fromkeys(slots, 0)
    total = sum(slot.parameters for slot in slots)
    target = share * total
    removed = 0
    while removed < target:
        open_slots = [slot for slot in slots if chosen[slot] < len(slot.steps)]
        if not open_slots:
            raise RecipeError(
                f"{share:.0%} can not be removed: the floor, head counts and the multiple of widths allow "
                f"{removed / total:.0%} here. Remove less, or lower 'floor' or 'multiple'."
            )
        best = min(open_slots, key=lambda slot: _slope(slot, errors[slot], chosen[slot]))
        chosen[best] += 1
        removed = sum(slot.removed(steps) for slot, steps in chosen.items())
    return chosen


def _slope(slot: Slot, errors: Sequence[float], done: int) -> float:
    """Least error per parameter over any number of further steps (a step may cost much and the next ones little)."""
    later = range(done + 1, len(slot.steps) + 1)
    return min((errors[n] - errors[done]) / (slot.removed(n) - slot.removed(done)) for n in later)


def shrink(config: DecoderConfig, chosen: Mapping[Slot, int], head_unit: HeadUnit, *, bias: bool) -> DecoderConfig:
    """The config after these steps."""
    layers = list(config.layers)
    for slot, steps in chosen.items():
        gone = sum(slot.steps[:steps])
        layer = layers[slot.layer]
        if not gone:
            continue
        if slot.part == "ffn":
            assert isinstance(layer.ffn, Dense)
            layers[slot.layer] = layer.model_copy(
                update={"ffn": narrow_ffn(layer.ffn, layer.ffn.hidden - gone, bias=bias)}
            )
        elif layer.attention is not None:
            spec = layer.attention
            each = spec.heads // spec.kv_heads
            sizes = {"heads": spec.heads - gone * (each if head_unit == "group" else spec.kv_heads)}
            if head_unit == "group":
                sizes["kv_heads"] = spec.kv_heads - gone
            changed = spec.model_copy(update={**sizes, "o_bias": spec.o_bias or bias})
            layers[slot.layer] = layer.model_copy(update={"attention": changed})
    return config.model_copy(update={"layers": tuple(layers)})
