"""Recompute or cache on a device that is not here: time by the roofline of its profile, memory by arithmetic.

Estimates, and labelled so. What decides in time is how much arithmetic the device does while it reads a
byte: recomputing one earlier position costs all its products, reading it back a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from trilemma.core.device import Device
from trilemma.core.quantity import format_quantity, significant
from trilemma.measure.device.device_model import decode_seconds
from trilemma.model.cost import kv_bytes_per_token
from trilemma.model.model import Model
from trilemma.search.forecast import AS_IT_IS, demand_of, form_of


@dataclass(frozen=True)
class KvOutlook:
    """Seconds of a decode step at one depth by policy, and what the device holds; all estimated.

    cheaper_from: the first depth at which a step with the policy is faster than recomputing (None: never within
    the model's context); longest: positions that fit beside the weights; break_even_macs_per_byte: what a
    device would have to do in arithmetic for each byte that it reads before recomputing became the faster way.
    """

    device: str
    depth: int
    step_s: dict[str, float]
    longest: dict[str, int]
    cheaper_from: dict[str, int | None]
    macs_per_byte: float
    break_even_macs_per_byte: dict[str, float]

    def sentence(self) -> str:
        """One line in words: who is faster from where on, times at the depth, positions that fit."""
        cached = [policy for policy in self.step_s if policy != "none"]
        times = ", ".join(f"{_word(policy)} {format_quantity(s, 's')}" for policy, s in self.step_s.items())
        room = ", ".join(f"{_word(policy)} {positions:,}" for policy, positions in self.longest.items())
        parts = [f"at {self.depth:,} positions {times} a token", f"positions that fit: {room}"]
        if "none" in self.step_s and cached:
            policy = cached[0]
            start = self.cheaper_from[policy]
            where = "never faster than recompute" if start is None else f"faster than recompute from {start:,} on"
            parts.insert(0, f"{_word(policy)} is {where}")
            parts.append(
                f"the device does {significant(self.macs_per_byte)} MACs while it reads a byte; recompute would need "
                f"{significant(self.break_even_macs_per_byte[policy])} to be the faster way"
            )
        return f"{self.device} (estimated): {'; '.join(parts)}"


def kv_outlook(
    model: Model, device: Device, *, policies: Sequence[str] = ("none", "bf16", "int8"), depth: int | None = None
) -> KvOutlook:
    """What each cache policy would cost on a device.

    Args:
        policies: of 'none', 'f32', 'bf16', 'int8'.
        depth: where times are stated; by default the model's context.

    Raises:
        InputError: an unknown policy.
    """
    config, form = model.config, form_of(model, AS_IT_IS)
    at = depth or config.max_context

    def step_s(policy: str, positions: int) -> float:
        demand = demand_of(model, replace(form, kv_cache=policy), positions, 1)
        if policy == "none":
            return decode_seconds(device, demand.prefill_bytes, demand.prefill_macs)[0]
        return decode_seconds(device, demand.read_bytes, demand.macs)[0]

    def cheaper(policy: str, positions: int) -> bool:
        return step_s(policy, positions) < step_s("none", positions)

    bytes_each = {policy: kv_bytes_per_token(config, policy) for policy in policies}
    one = demand_of(model, form, 1, 1)
    products = {p: count for p, count in one.prefill_macs.items() if count > 0}
    head = config.vocab_size * config.dim
    seconds_per_position = sum(count / device.macs_per_s[p].value for p, count in products.items())
    total = sum(products.values())
    position_macs = max(total - head, 1.0)  # logits are wanted of the last position only
    room = device.usable_bytes.value - one.weights_bytes
    return KvOutlook(
        device=device.name,
        depth=at,
        step_s={policy: step_s(policy, at) for policy in policies},
        longest={policy: _longest(room, each, config.max_context) for policy, each in bytes_each.items()},
        cheaper_from={
            policy: _first(config.max_context, partial(cheaper, policy))
            for policy in policies if policy != "none"
        },
        macs_per_byte=total / seconds_per_position / device.sustained_bytes_per_s,
        break_even_macs_per_byte={p: position_macs / each for p, each in bytes_each.items() if each},
    )  # fmt: skip


def _longest(room: float, bytes_each: int, most: int) -> int:
    if room <= 0:
        return 0
    return most if bytes_each == 0 else int(min(most, room // bytes_each))


def _first(most: int, holds: Callable[[int], bool]) -> int | None:
    """The least n in 1..most at which `holds(n)`, which stays true once it is; None: nowhere."""
    if not holds(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _word(policy: str) -> str:
    return "recompute" if policy == "none" else f"cache {policy}"


__all__ = ["KvOutlook", "kv_outlook"]
