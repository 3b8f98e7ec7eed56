"""What a precision ladder's figures say, in sentences; nothing is claimed that an interval does not carry."""

from __future__ import annotations

from collections.abc import Iterator

from trilemma.core.ladder import Ladder, Rung
from trilemma.core.quantity import format_quantity, significant

F16_LARGEST = 65_504.0
UNSTABLE = 2.0  # times the KL of the same weights with 16-bit activations


def findings(ladder: Ladder) -> tuple[str, ...]:
    """Sentences on speed, range, instability and repair, in that order."""
    return (*_speed(ladder), *_range(ladder), *_instability(ladder), *_repairs(ladder))


def _speed(ladder: Ladder) -> Iterator[str]:
    """Why fewer bits are faster: bytes in decode, multiply-accumulates in prefill."""
    base = ladder.rung("f32")
    for name in ("W8A8-g32", "W4A8-g32"):
        rung = ladder.rung(name)
        if rung.failed or not (rung.decode_bytes_per_s and base.decode_bytes_per_s):
            continue
        fewer = _bytes(base) / _bytes(rung)
        shares = f"{_share(rung.bandwidth_share)} of the read bandwidth against {_share(base.bandwidth_share)}"
        prefill = (rung.prefill_macs_per_s or 0) / (base.prefill_macs_per_s or 1)
        yield (
            f"{name} decodes in {_ratio(rung, 'tpot_s')} of f32's time with {fewer:.1f}x fewer bytes of weights "
            f"({shares}), and "
            f"prefills in {_ratio(rung, 'ttft_s')}: {prefill:.1f}x the multiply-accumulates a second "
            f"({_billions(rung.prefill_macs_per_s)} against {_billions(base.prefill_macs_per_s)})."
        )


def _range(ladder: Ladder) -> Iterator[str]:
    room = F16_LARGEST / ladder.largest_activation
    where = f"{significant(ladder.largest_activation)} at {ladder.largest_at}"
    rung = ladder.rung("f16 arithmetic")
    if rung.failed:
        yield (
            f"f16 arithmetic breaks: {rung.failed} The largest activation is {where} in f32; f16 ends at 65,504. "
            "bf16 has the range of f32 and repairs it."
        )
    elif room < 8:
        yield f"f16 arithmetic is {significant(room)}x from overflow (largest activation {where}): prefer bf16."
    else:
        yield f"f16 arithmetic has room: the largest activation is {where}, {significant(room)}x below 65,504."


def _instability(ladder: Ladder) -> Iterator[str]:
    """int8 activations against the same weights with 16-bit ones."""
    for rounded, kept in (("W8A8-g32", "W8A16"), ("W4A8-g32", "W4A16-g32")):
        ours, theirs = _kl(ladder.rung(rounded)), _kl(ladder.rung(kept))
        if ours is None or theirs is None or theirs[0] <= 0:
            continue
        times = ours[0] / theirs[0]
        channel = f"the worst channel is {significant(ladder.outlier_ratio)}x the median one ({ladder.outlier_at})"
        if ours[1] > UNSTABLE * theirs[2]:
            yield f"int8 activations are unstable here: {rounded} has {times:.1f}x the KL of {kept}; {channel}."
        else:
            yield f"int8 activations hold: {rounded} has {times:.1f}x the KL of {kept}; {channel}."


def _repairs(ladder: Ladder) -> Iterator[str]:
    for rung in ladder.rungs:
        if rung.repairs is None:
            continue
        if rung.failed:
            yield f"{rung.name} could not be built: {rung.failed}"
            continue
        before, after = _kl(ladder.rung(rung.repairs)), _kl(rung)
        if before is None or after is None:
            continue
        spent = rung.measurements["build_s"]
        cost = f"for {format_quantity(spent.value or 0, 's')} of building"
        energy = rung.measurements.get("build_energy_j")
        if energy is not None and energy.value is not None:
            cost += f" (~{format_quantity(energy.value, 'J')}, {energy.source})"
        change = f"KL {significant(before[0])} -> {significant(after[0])}"
        if after[2] < before[1]:
            less = before[0] / after[0]
            yield f"{rung.name} repairs {rung.repairs} ({rung.what}): {change}, {less:.1f}x less, {cost}."
        elif after[1] > before[2]:
            yield f"{rung.name} makes {rung.repairs} worse here ({rung.what}): {change}, {cost}."
        else:
            yield f"{rung.name} ({rung.what}): {change}, no clear difference to {rung.repairs}, {cost}."


def _kl(rung: Rung) -> tuple[float, float, float] | None:
    found = rung.measurements.get("kl_mean")
    if found is None or found.value is None:
        return None
    low, high = found.interval or (found.value, found.value)
    return found.value, low, high


def _bytes(rung: Rung) -> float:
    return rung.measurements["weights_bytes"].value or 1.0


def _ratio(rung: Rung, metric: str) -> str:
    value, low, high = rung.relative[metric]
    interval = "" if low is None or high is None else f" [{low:.0%}, {high:.0%}]"
    return f"{value:.0%}{interval}"


def _billions(rate: float | None) -> str:
    return "?" if rate is None else f"{rate / 1e9:,.0f} billion"


def _share(share: float | None) -> str:
    return "?" if share is None else f"{share:.0%}"
