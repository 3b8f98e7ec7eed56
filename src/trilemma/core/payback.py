"""After how many output tokens what building a model cost is repaid by what each token saves."""

from __future__ import annotations

import math
from typing import Literal

from trilemma.core.measurement import Source
from trilemma.core.quantity import format_duration, format_quantity, significant
from trilemma.core.record import Record


class Payback(Record):
    """One resource: joules or seconds.

    spent: once, on building (or on the whole search); saved_per_token: the unmodified model's less the new
    one's, negative when the new one costs more; tokens: output tokens that repay it, None when nothing is saved;
    source: 'estimated' as soon as one of the numbers is.
    """

    resource: Literal["energy", "time"]
    what: Literal["build", "search"]
    spent: float
    saved_per_token: float
    tokens: float | None
    source: Source = "measured"

    @property
    def text(self) -> str:
        """'the build took 3.1 kJ (estimated); saving 12 mJ a token repays it after 258,000 output tokens'."""
        if self.resource == "energy":
            spent, saved = format_quantity(self.spent, "J"), format_quantity(abs(self.saved_per_token), "J")
        else:
            spent = format_duration(self.spent) if self.spent >= 60 else format_quantity(self.spent, "s")
            saved = format_quantity(abs(self.saved_per_token), "s")
        spent = f"{spent} of {self.resource}{' (estimated)' if self.source == 'estimated' else ''}"
        if self.tokens is None:
            why = f"a token costs {saved} more" if self.saved_per_token < 0 else "a token saves nothing"
            return f"the {self.what} took {spent}, which is never repaid: {why}"
        return f"the {self.what} took {spent}; saving {saved} a token repays it after {tokens_text(self.tokens)}"


def payback_tokens(spent: float, before: float, after: float) -> float | None:
    """Output tokens that repay `spent`, when one costs `before` with the old model and `after` with the new.

    Returns:
        None when nothing is saved: it is never repaid.

    Raises:
        ValueError: a negative cost.
    """
    if min(spent, before, after) < 0:
        raise ValueError("costs are not negative")
    saved = before - after
    return None if saved <= 0 or not math.isfinite(spent / saved) else spent / saved


def payback(
    resource: Literal["energy", "time"],
    spent: float,
    before: float,
    after: float,
    *,
    what: Literal["build", "search"] = "build",
    source: Source = "measured",
) -> Payback:
    """The record of `payback_tokens`; costs in joules or seconds."""
    tokens = payback_tokens(spent, before, after)
    return Payback(
        resource=resource, what=what, spent=spent, saved_per_token=before - after, tokens=tokens, source=source
    )


def tokens_text(tokens: float) -> str:
    """'258,000 output tokens', '1.20 million output tokens'."""
    if tokens >= 1e6:
        return f"{significant(tokens / 1e6)} million output tokens"
    digits = max(0, math.floor(math.log10(max(tokens, 1))) - 2)
    return f"{round(tokens / 10**digits) * 10**digits:,.0f} output tokens"
