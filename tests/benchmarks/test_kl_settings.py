"""KL divergence of the default settings of two engines: the arithmetic by the textbook formula, the verdicts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from trilemma.measure.stats import Interval

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import kl_settings


def test_divergence_is_the_textbook_formula():
    rng = np.random.default_rng()
    first, second = (rng.normal(scale=3, size=(5, 17)).astype(np.float32) for _ in range(2))
    found = kl_settings.divergence(first, second)
    for row in range(5):
        p, q = (np.exp(x[row].astype(np.float64)) / np.exp(x[row].astype(np.float64)).sum() for x in (first, second))
        assert found[row] == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-9)
    assert kl_settings.divergence(first, first + 7).max() < 1e-6  # a constant changes nothing


def test_windows_are_spread_over_the_text(hearth_path):
    text = "Once upon a time there was a little girl who lived beside the sea. " * 60
    every = kl_settings.windows_of(hearth_path, text, 64, 1000)
    some = kl_settings.windows_of(hearth_path, text, 64, 4)
    assert {len(window) for window in every} == {64}
    assert len(some) == 4
    np.testing.assert_array_equal(some[0], every[0])
    np.testing.assert_array_equal(some[-1], every[-1])
    with pytest.raises(SystemExit, match="need at least 128"):
        kl_settings.windows_of(hearth_path, "Too short.", 64, 4)


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [((1.0, 0.9, 1.05), "met"), ((1.05, 0.9, 1.2), "met, interval beyond"), ((1.2, 1.15, 1.25), "not met"),
     ((1.0, None, None), "met, interval beyond")],
)  # fmt: skip
def test_verdicts(ratio, verdict):
    row = kl_settings.Row("m", "Q4_0", 10**6, 0.1, 0.1, Interval(*ratio))
    assert row.verdict(1.1) == verdict
    assert f"| {verdict} |" in row.line(1.1)
