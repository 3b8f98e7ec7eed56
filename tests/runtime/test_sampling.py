"""The reference sampler: each filter against a plain oracle, the draw against the distribution."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import InputError
from trilemma.runtime.engine import SamplingSettings
from trilemma.runtime.sampling import candidates, check_sampling, choose, penalize, uniform


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x.astype(np.float64) - x.max())
    return weights / weights.sum()


def _allowed(logits: np.ndarray, settings: SamplingSettings) -> set[int]:
    """The plain way: dictionaries and loops."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if settings.top_k:
        ranked = ranked[: settings.top_k]
    probability = dict(zip(ranked, _softmax(logits[ranked] / settings.temperature), strict=True))
    kept, total = [], 0.0
    for token in ranked:
        kept.append(token)
        total += probability[token]
        if settings.top_p < 1 and total >= settings.top_p:
            break
    return {token for token in kept if probability[token] >= settings.min_p * probability[ranked[0]]}


def test_filters_equal_the_plain_way(random_generator):
    for _ in range(200):
        logits = random_generator.normal(0, 3, int(random_generator.integers(2, 60))).astype(np.float32)
        settings = SamplingSettings(
            temperature=float(random_generator.uniform(0.2, 2)),
            top_k=int(random_generator.choice([0, 1, 3, 20])),
            top_p=float(random_generator.choice([1.0, 0.9, 0.5, 0.01])),
            min_p=float(random_generator.choice([0.0, 0.05, 0.5])),
        )
        tokens, probabilities = candidates(logits, settings)
        assert set(tokens.tolist()) == _allowed(logits, settings)
        np.testing.assert_allclose(
            probabilities / probabilities.sum(), _softmax(logits[tokens] / settings.temperature), rtol=1e-5
        )


def test_filters_equal_transformers(random_generator):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    for _ in range(50):
        logits = random_generator.normal(0, 3, 40).astype(np.float32)
        seen = random_generator.integers(0, 40, 12).tolist()
        settings = SamplingSettings(temperature=0.8, top_k=15, top_p=0.9, min_p=0.03, repetition_penalty=1.3)
        steps = [
            hf.RepetitionPenaltyLogitsProcessor(1.3), hf.TemperatureLogitsWarper(0.8), hf.TopKLogitsWarper(15),
            hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.03),
        ]  # fmt: skip
        theirs = torch.from_numpy(logits.copy())[None]
        for step in steps:
            theirs = step(torch.tensor([seen]), theirs)
        tokens, _ = candidates(penalize(logits, seen, 1.3), settings)
        assert set(tokens.tolist()) == set(torch.isfinite(theirs[0]).nonzero()[:, 0].tolist())


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32))
    settings = SamplingSettings(temperature=1.0, seed=11)
    draws = [choose(logits, range(n), settings) for n in range(4000)]
    shares = np.bincount(draws, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=0.03)


def test_draws_depend_on_seed_and_position_alone():
    logits = np.zeros(1000, dtype=np.float32)
    one = [choose(logits, [0] * n, SamplingSettings(temperature=1, seed=1)) for n in range(20)]
    assert one == [choose(logits, [7] * n, SamplingSettings(temperature=1, seed=1)) for n in range(20)]
    assert one != [choose(logits, [0] * n, SamplingSettings(temperature=1, seed=2)) for n in range(20)]


def test_uniform_is_splitmix64():
    # first outputs of the reference C implementation for state 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [uniform(1234567, n) for n in range(3)] == [(value >> 11) * 2.0**-53 for value in expected]


def test_greedy_takes_the_first_of_equal_logits():
    logits = np.array([1, 5, 5, 2], dtype=np.float32)
    assert choose(logits, [], SamplingSettings()) == 1
    assert choose(logits, [1], SamplingSettings(repetition_penalty=1.5)) == 2


def test_penalty_pushes_down_whatever_the_sign():
    logits = np.array([2.0, -2.0, 2.0, -2.0], dtype=np.float32)
    np.testing.assert_array_equal(penalize(logits, [0, 1, 1], 2.0), [1.0, -4.0, 2.0, -2.0])
    np.testing.assert_array_equal(logits, [2.0, -2.0, 2.0, -2.0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.1), ("min_p", 2.0), ("repetition_penalty", 0.0)],
)  # fmt: skip
def test_settings_out_of_range(name, value):
    with pytest.raises(InputError, match=f"{name} is .*; it must be"):
        check_sampling(SamplingSettings(**{name: value}))
