"""How the next token is chosen from logits: the reference that every engine's sampler agrees with.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p, then one
draw. Randomness is counter-based, keyed by (seed, position), so that a token does not depend on
batch, threads or what was drawn before:

    u = splitmix64(seed + (position + 1) * 0x9E3779B97F4A7C15) >> 11, times 2^-53

`position` is the number of tokens before the one that is drawn, prompt included. Tokens are ordered
by falling logit, equal ones by id; the draw is the first whose running sum of probabilities exceeds u.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import InputError
from trilemma.runtime.engine import SamplingSettings

HEAD = 256  # likeliest tokens among which nearly every draw falls

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def check_sampling(settings: SamplingSettings) -> None:
    """Raise InputError for a setting outside its range, naming it, its value and the range."""
    ranges = {
        "max_tokens": (settings.max_tokens >= 1, "at least 1"),
        "temperature": (0 <= settings.temperature < float("inf"), "0 (greedy) or above"),
        "top_k": (settings.top_k >= 0, "0 (off) or above"),
        "top_p": (0 < settings.top_p <= 1, "above 0 and at most 1"),
        "min_p": (0 <= settings.min_p <= 1, "between 0 and 1"),
        "repetition_penalty": (0 < settings.repetition_penalty < float("inf"), "above 0; 1 is off"),
    }
    for name, (fits, range_text) in ranges.items():
        if not fits:
            raise InputError(f"{name} is {getattr(settings, name)}; it must be {range_text}.")


def choose(logits: NDArray[np.float32], seen: Sequence[int], settings: SamplingSettings) -> int:
    """The next token.

    Args:
        logits: (vocab,) f32.
        seen: every token so far, prompt included: what the repetition penalty punishes, and the position.
        settings: temperature 0 takes the largest logit (the first of equal ones).
    """
    scores = penalize(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return int(scores.argmax())
    if not settings.top_k and len(scores) > 4 * HEAD:
        token = _draw_from_head(scores, settings, uniform(settings.seed, len(seen)))
        if token is not None:
            return token
    tokens, probabilities = candidates(scores, settings)
    running = np.cumsum(probabilities)
    u = uniform(settings.seed, len(seen)) * running[-1]
    return int(tokens[min(int(np.searchsorted(running, u, side="right")), len(tokens) - 1)])


def penalize(logits: NDArray[np.float32], seen: Sequence[int], penalty: float) -> NDArray[np.float32]:
    """CTRL's penalty (arXiv:1909.05858): seen tokens' positive logits divided by it, negative ones multiplied."""
    if penalty == 1 or not len(seen):
        return logits
    scores = logits.copy()
    tokens = np.unique(np.asarray(seen, dtype=np.int64))
    picked = scores[tokens]
    factor = np.float32(penalty)
    scores[tokens] = np.where(picked > 0, picked / factor, picked * factor)
    return scores


def candidates(
    scores: NDArray[np.float32], settings: SamplingSettings
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that may be drawn, most likely first, with their (unnormalized) probabilities in f64."""
    order = _most_likely(scores, settings.top_k or len(scores))
    scaled = scores[order].astype(np.float64) / settings.temperature
    probabilities = np.exp(scaled - scaled[0])
    if settings.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        keep = before < settings.top_p * probabilities.sum()  # the token that crosses top_p stays
        keep[0] = True
        order, probabilities = order[keep], probabilities[keep]
    if settings.min_p > 0:
        keep = probabilities >= settings.min_p * probabilities[0]
        order, probabilities = order[keep], probabilities[keep]
    return order, probabilities


def _most_likely(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The `count` tokens of the largest scores: falling score, then rising id. Few are found without a full sort."""
    chosen = np.arange(len(scores))
    if count < len(scores) // 4:
        chosen = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    return chosen[np.argsort(-scores[chosen], kind="stable")][:count]


def _draw_from_head(scores: NDArray[np.float32], settings: SamplingSettings, u: float) -> int | None:
    """The draw without sorting the whole vocabulary, or None where it may fall outside the `HEAD` likeliest.

    The same token as from all candidates, but for a draw within rounding (1e-15) of the border of two.
    """
    order = _most_likely(scores, HEAD)
    scaled = scores[order].astype(np.float64) / settings.temperature
    top = scaled[0]
    running = np.cumsum(np.exp(scaled - top))
    total = float(np.exp(scores.astype(np.float64) / settings.temperature - top).sum())
    if settings.top_p < 1:
        kept = int(np.searchsorted(running, settings.top_p * total, side="left")) + 1
        if kept > HEAD:
            return None
        running, total = running[:kept], float(running[kept - 1])
    if settings.min_p > 0:
        kept = int(np.count_nonzero(np.exp(scaled[: len(running)] - top) >= settings.min_p))
        if kept == HEAD:
            return None
        running, total = running[:kept], float(running[kept - 1])
    at = int(np.searchsorted(running, u * total, side="right"))
    return int(order[at]) if at < len(running) else None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone (splitmix64)."""
    x = (seed + (position + 1) * _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53
