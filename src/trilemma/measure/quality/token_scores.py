"""What one window of logits says about its tokens: the arithmetic of quality, apart from loops and files.

Sums are float64; the exponentials are float32, chunk by chunk so that they stay in cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

ROWS = 32  # rows a chunk
FLOOR_NATS = 40.0  # log-probabilities further below the largest are kept as that


@dataclass(frozen=True)
class PackedLogProbs:
    """Log-probabilities in 16 bits: log p = top - step * code, each row with its own step.

    The rounding of at most step/2 (0.0003 nats at a span of 40) adds about step^2/24 to a KL, below 2e-8.

    codes: (rows, vocab) uint16; top, step: (rows,) float32.
    """

    codes: NDArray[np.uint16]
    top: Float32
    step: Float32

    def rows(self, rows: slice) -> PackedLogProbs:
        return PackedLogProbs(self.codes[rows], self.top[rows], self.step[rows])


def log_normalizer(logits: Float32) -> Float64:
    """log sum exp of each row, (rows,); NaN or infinity where a row holds one."""
    found = np.empty(len(logits), np.float64)
    with np.errstate(all="ignore"):
        for start in range(0, len(logits), ROWS):
            rows = logits[start : start + ROWS]
            top = rows.max(axis=1)
            sums = np.exp(rows - top[:, None]).sum(axis=1, dtype=np.float64)
            found[start : start + ROWS] = top + np.log(sums)
    return found


def token_nll(logits: Float32, targets: NDArray[np.int32], normalizer: Float64) -> Float64:
    """Negative log-likelihood of each target in nats, (rows,)."""
    picked = logits[np.arange(len(targets)), targets].astype(np.float64)
    return normalizer - picked


def pack_log_probs(logits: Float32, normalizer: Float64) -> PackedLogProbs:
    """The log-softmax of each row in 16 bits a value."""
    top = logits.max(axis=1)
    span = np.minimum(top - logits.min(axis=1), FLOOR_NATS)
    step = np.maximum(span / 65535, np.float32(1e-9)).astype(np.float32)
    codes = np.empty(logits.shape, np.uint16)
    for start in range(0, len(logits), ROWS):
        rows = slice(start, start + ROWS)
        scaled = (top[rows, None] - logits[rows]) / step[rows, None]
        np.minimum(scaled, 65535, out=scaled)
        np.rint(scaled, out=scaled)
        codes[rows] = scaled
    return PackedLogProbs(codes, (top - normalizer).astype(np.float32), step)


def kl_divergence(reference: PackedLogProbs, logits: Float32, normalizer: Float64) -> Float64:
    """KL(reference || model) of each row in nats, (rows,).

    The rounded reference is normalised again, so that equal logits give 0 within 1e-7.
    """
    found = np.empty(len(logits), np.float64)
    with np.errstate(all="ignore"):
        for start in range(0, len(logits), ROWS):
            rows = slice(start, start + ROWS)
            log_p = reference.codes[rows].astype(np.float32)
            log_p *= -reference.step[rows, None]
            log_p += reference.top[rows, None]
            p = np.exp(log_p)
            total = p.sum(axis=1, dtype=np.float64)
            log_p -= logits[rows]
            log_p += normalizer[rows, None].astype(np.float32)
            p *= log_p
            found[rows] = p.sum(axis=1, dtype=np.float64) / total - np.log(total)
    return found
