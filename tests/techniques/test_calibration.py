"""The calibration loop: what it gathers does not depend on how many threads walk the windows."""

from __future__ import annotations

import numpy as np
import torch

from trilemma.model.model import LinearRun
from trilemma.techniques import calibration
from trilemma.techniques import threads as sharing
from trilemma.techniques.technique import Build


def gather(model, windows, runs, threads):
    """Every layer's X^T X by name."""
    found = {}

    def replace(grams):
        found.update({name: gram.matrix.clone() for name, gram in grams.items()})
        return {}

    calibration.calibrate_layers(model, Build(windows, threads=threads), runs, replace)
    return found


def test_threads_do_not_mix_up_windows(tiny_model, random_generator, monkeypatch):
    """Rounded inputs are shared by q, k and v; a share that crossed threads would mix windows."""
    monkeypatch.setattr(sharing, "_BATCH_TOKENS", 32)
    model = tiny_model()
    windows = random_generator.integers(0, model.config.vocab_size, (96, 32)).astype(np.int32)
    runs = {name: LinearRun(activation="int8-g32") for name in model.config.linear_names()}
    alone = gather(model, windows, runs, 1)
    for _ in range(4):
        together = gather(model, windows, runs, 4)
        for name, expected in alone.items():
            scale = float(expected.abs().max())
            assert torch.allclose(together[name], expected, rtol=0, atol=2e-3 * scale), name
