"""The matrix products alone of a dense model's layers, one after the other, their inputs' rounding included."""

from __future__ import annotations

import math

from trilemma import _native
from trilemma.formats.artifact import load_any
from trilemma.measure.device.step_time import product_jobs
from trilemma.runtime.native_weights import load_weights


class LayerProducts:
    """A model's weights, ready for walks over all products of its layers (its head is left out)."""

    def __init__(self, path: str, threads: int) -> None:
        model = load_any(path)
        self._jobs = [list(job.names) for job in product_jobs(model.config, 1, head=True)][:-1]
        shapes = model.config.tensor_shapes()
        self.macs_per_token = sum(math.prod(shapes[name]) for names in self._jobs for name in names)
        self._threads = threads
        self._weights = load_weights(model, threads=threads)
        self._weights.settle(threads)

    def walk(self, tokens: int, passes: int) -> list[float]:
        """Seconds of each of some walks."""
        return _native.time_products(self._weights, self._jobs, tokens=tokens, threads=self._threads, passes=passes)
