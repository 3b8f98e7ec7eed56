"""The physical limits beside which a measured rate stands: read bandwidth, and the share of it that was used.

The ceiling is the best of several probes in the same run, at the size of the measured working set:
a model that fits in cache is held against the cache, not against memory. The probes are numpy
reductions in threads (numpy frees the interpreter) and the native module's own where it has one.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LARGEST_PROBE_BYTES = 512_000_000
_LEAST_S = 0.03
_ROUNDS = 4


class Bandwidth(NamedTuple):
    """Bytes read per second, by which probe, at which working set and number of threads."""

    bytes_per_s: float
    probe: str
    working_set_bytes: int
    threads: int


def read_bandwidth(threads: int = 1, working_set_bytes: int = 512_000_000) -> Bandwidth:
    """Best streaming read rate of several probes.

    Args:
        threads: each reads its own slice.
        working_set_bytes: bytes read again and again; the size of the weights makes a fair ceiling.
    """
    size = int(min(max(working_set_bytes, 1 << 20), LARGEST_PROBE_BYTES))
    data = np.ones(size // 4, np.float32)
    slices = np.array_split(data, max(1, threads))
    found = {name: _rate(probe, slices) for name, probe in _PROBES.items()}
    native = _native_probe(threads, size)
    if native is not None:
        found["native"] = native
    best = max(found, key=lambda name: found[name])
    return Bandwidth(found[best], best, size, threads)


def roofline_share(bytes_per_token: float, tokens_per_s: float, bandwidth: Bandwidth) -> float:
    """Share of the read bandwidth that decoding used: bytes a token x tokens a second / bytes a second."""
    return bytes_per_token * tokens_per_s / bandwidth.bytes_per_s


def _largest(part: NDArray[np.float32]) -> None:
    part.max()


def _sum(part: NDArray[np.float32]) -> None:
    part.sum()


def _or_words(part: NDArray[np.float32]) -> None:
    np.bitwise_or.reduce(part.view(np.int32))


_PROBES: dict[str, Callable[[NDArray[np.float32]], None]] = {"max": _largest, "sum": _sum, "or": _or_words}


def _rate(probe: Callable[[NDArray[np.float32]], None], slices: list[NDArray[np.float32]]) -> float:
    total = sum(part.nbytes for part in slices)
    with ThreadPoolExecutor(len(slices)) as pool:
        list(pool.map(probe, slices))
        began = time.perf_counter()
        list(pool.map(probe, slices))
        passes = max(1, int(_LEAST_S / max(time.perf_counter() - began, 1e-6)))

        def work(part: NDArray[np.float32]) -> None:
            for _ in range(passes):
                probe(part)

        best = 0.0
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            list(pool.map(work, slices))
            best = max(best, total * passes / (time.perf_counter() - began))
    return best


def _native_probe(threads: int, size: int) -> float | None:
    try:
        module = importlib.import_module("trilemma._native")
    except ImportError:
        return None
    probe = getattr(module, "read_bandwidth", None)
    return None if probe is None else float(probe(threads, size))
