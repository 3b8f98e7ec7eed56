"""A cascade: whose answer it is, that giving up early changes no decision, and the record that is kept."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import EngineError, InputError, OutputError
from trilemma.runtime.cascade import CascadeEngine, confidence, open_cascade
from trilemma.runtime.cascade_record import CascadeRecord, CascadeRule
from trilemma.runtime.engine import EngineOptions, SamplingSettings
from trilemma.runtime.native import NativeEngine

ONE = EngineOptions(threads=1)


@pytest.fixture(scope="module")
def engines(tiny_model):
    return NativeEngine(tiny_model(seed=1, dim=36), ONE), NativeEngine(tiny_model(seed=2), ONE)


def test_the_threshold_decides_who_answers(engines, random_generator):
    small, large = engines
    settings = SamplingSettings(max_tokens=12)
    for _ in range(5):
        prompt = random_generator.integers(0, 97, 9).tolist()
        kept = CascadeEngine(small, large, CascadeRule(threshold=0)).generate(prompt, settings)
        assert (kept.by, kept.tokens) == ("small", small.generate(prompt, settings).tokens)
        assert kept.large_s == 0
        seen: list[int] = []
        asked = CascadeEngine(small, large, CascadeRule(threshold=1)).generate(prompt, settings, seen.append)
        assert (asked.by, asked.tokens) == ("large", large.generate(prompt, settings).tokens)
        assert seen == asked.tokens
        assert len(asked.token_times_s) == len(asked.tokens)
        assert min(asked.token_times_s) >= asked.small_s


@pytest.mark.parametrize("signal", ["mean", "p10"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_giving_up_early_changes_no_decision(engines, random_generator, signal, temperature):
    small, large = engines
    settings = SamplingSettings(max_tokens=25, temperature=temperature, seed=2, stop_token_ids=(3, 4))
    prompts = [random_generator.integers(0, 97, 6).tolist() for _ in range(40)]
    plain = CascadeEngine(small, large, CascadeRule(threshold=0))
    sure = [confidence(plain.try_small(prompt, settings).probabilities, signal) for prompt in prompts]
    threshold = float(np.quantile(sure, 0.6))
    cascade = CascadeEngine(small, large, CascadeRule(signal=signal, threshold=threshold))
    found = [cascade.generate(prompt, settings) for prompt in prompts]
    assert [one.by for one in found] == ["small" if value >= threshold else "large" for value in sure]
    assert any(one.confidence is None for one in found)  # some were given up early, and that saved work
    assert sum(one.small_tokens for one in found) <= sum(
        len(plain.try_small(prompt, settings).probabilities) for prompt in prompts
    )


def test_confidence_is_read_from_the_softmax(engines, random_generator):
    small, large = engines
    prompt = random_generator.integers(0, 97, 5).tolist()
    tried = CascadeEngine(small, large, CascadeRule(threshold=0)).try_small(prompt, SamplingSettings(max_tokens=7))
    tokens = tried.generation.tokens
    logits = small.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(tried.probabilities, shares[np.arange(7), tokens], rtol=1e-5)
    assert confidence([0.5, 0.5, 0.125, 0.5], "mean") == pytest.approx((0.5**3 * 0.125) ** 0.25)
    assert confidence([0.9] * 18 + [0.2, 0.1], "p10") == 0.2
    assert confidence([], "mean") == 0


def test_a_listener_may_stop_a_kept_answer(engines):
    cascade = CascadeEngine(*engines, CascadeRule(threshold=0))
    seen: list[int] = []

    def until_three(token):
        seen.append(token)
        return len(seen) < 3

    done = cascade.generate([1, 2], SamplingSettings(max_tokens=9), until_three)
    assert (done.finish_reason, done.tokens) == ("interrupted", seen)
    with pytest.raises(EngineError, match="no logits of its own"):
        cascade.logits([1])


@pytest.mark.shared
def test_models_of_different_tokens_are_refused(hearth_path, shared_dir):
    with pytest.raises(InputError, match="another tokenizer"):
        open_cascade(shared_dir / "models" / "stories260K", hearth_path, CascadeRule(threshold=0.5))


def test_a_damaged_record_is_refused(tmp_path):
    file = tmp_path / "cascade.json"
    with pytest.raises(InputError, match="Can not read"):
        CascadeRecord.read(file)
    file.write_text('{"schema_version": 1, "surprise": 2}')
    with pytest.raises(InputError, match="is no record of a cascade"):
        CascadeRecord.read(file)
    with pytest.raises(ValueError, match="less than or equal"):
        CascadeRule(threshold=1.5)
    assert issubclass(OutputError, InputError)
