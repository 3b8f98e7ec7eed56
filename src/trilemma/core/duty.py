"""How much of the time a device works: '200 tokens/h' or '5%'. What a battery then gives is plain arithmetic."""

from __future__ import annotations

import re

from trilemma.core.errors import InputError
from trilemma.core.record import Record

_TOKENS = re.compile(r"\s*([0-9.]+(?:[eE][+-]?\d+)?)\s*(?:tokens?|tok|t)\s*/\s*(h|hour|d|day|s)\s*", re.IGNORECASE)
_SHARE = re.compile(r"\s*([0-9.]+)\s*%\s*")
_PER_HOUR = {"s": 3600.0, "h": 1.0, "hour": 1.0, "d": 1 / 24, "day": 1 / 24}


class DutyCycle(Record):
    """Output tokens per hour, or the share of the time that is spent answering. Exactly one is set."""

    text: str
    tokens_per_h: float | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> DutyCycle:
        """Read '200 tokens/h', '5000 tokens/day', '5%'.

        Raises:
            InputError: neither form, or a number that can not be one.
        """
        tokens, share = _TOKENS.fullmatch(text), _SHARE.fullmatch(text)
        try:
            if tokens and (rate := float(tokens[1])) > 0:
                return cls(text=text.strip(), tokens_per_h=rate * _PER_HOUR[tokens[2].lower()])
            if share and 0 < (percent := float(share[1])) <= 100:
                return cls(text=text.strip(), share=percent / 100)
        except ValueError:
            pass
        raise InputError(
            f"Can not read the duty cycle '{text}'. Expected output tokens in a time such as '200 tokens/h' or "
            "'5000 tokens/day', or the share of the time spent answering, such as '5%' (more than 0, at most 100%)."
        )

    def busy_share(self, seconds_per_token: float) -> float:
        """Share of the time spent answering; above 1 when so many tokens can not be made."""
        if self.share is not None:
            return self.share
        assert self.tokens_per_h is not None
        return self.tokens_per_h * seconds_per_token / 3600


def battery_hours(*, battery_wh: float, idle_w: float, busy_w: float, busy_share: float) -> float:
    """Hours of a full battery: idle_w while waiting, busy_w while answering.

    Raises:
        InputError: the device can not keep up (`busy_share` above 1).
    """
    if not 0 <= busy_share <= 1:
        raise InputError(f"The device would have to answer {busy_share:.0%} of the time. Ask for fewer tokens.")
    return battery_wh / (idle_w * (1 - busy_share) + busy_w * busy_share)
