"""Numbers as people read them: 13.6 MB, 21.3 ms, +1.2%. MB is 10^6 bytes."""

from __future__ import annotations

import math

_STEPS: dict[str, tuple[tuple[float, str], ...]] = {
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
    "s": ((60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "J": ((1, "J"), (1e-3, "mJ"), (1e-6, "µJ")),
    "W": ((1, "W"), (1e-3, "mW")),
}


def format_quantity(value: float | None, unit: str) -> str:
    """Three significant figures in the unit that fits; a fraction ('ratio') as per cent; None as an em dash."""
    if value is None or not math.isfinite(value):
        return "—"
    if unit == "ratio":
        return format_percent(value)
    if unit in _STEPS:
        factor, name = _fitting(abs(value), _STEPS[unit])
        return f"{significant(value / factor)} {name}"
    return f"{significant(value)} {unit}".strip()


def format_percent(fraction: float, *, signed: bool = False) -> str:
    """0.012 -> '1.2%'; small fractions keep two figures: 0.00046 -> '0.046%'."""
    percent = 100 * fraction
    digits = 1 if abs(percent) >= 1 or percent == 0 else min(4, 1 - math.floor(math.log10(abs(percent))))
    text = f"{percent:+.{digits}f}%" if signed else f"{percent:.{digits}f}%"
    return text.replace("-0.0%", "0.0%")


def significant(value: float, figures: int = 3) -> str:
    """Rounded to so many figures, without an exponent where that stays readable: 13.6, 0.0123, 1,234."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{value:.{figures - 1}e}"
    if size >= figures - 1:
        return f"{value:,.0f}"
    return f"{value:.{figures - 1 - size}f}"


def format_duration(seconds: float) -> str:
    """Elapsed or remaining time: '8 s', '3 min 20 s', '1 h 5 min'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _fitting(size: float, steps: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    for factor, name in steps:
        if size >= factor * 0.9995:
            return factor, name
    return steps[-1] if size > 0 else next((step for step in steps if step[0] == 1), steps[-1])
