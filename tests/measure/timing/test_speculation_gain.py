"""The measured gain: its sign is that of a machine whose passes cost what we say, and equality is checked."""

from __future__ import annotations

import pytest

from trilemma.core.errors import EngineError, InputError
from trilemma.measure.timing.speculation import measure_speculation
from trilemma.runtime.drafts import LookupDraft
from trilemma.runtime.engine import EngineOptions, SamplingSettings
from trilemma.runtime.native import NativeEngine
from trilemma.runtime.speculative import SpeculativeEngine, model_draft


@pytest.fixture
def engine(tiny_model):
    target = NativeEngine(tiny_model(seed=1), EngineOptions(threads=1))
    return SpeculativeEngine(target, model_draft(target, NativeEngine(tiny_model(seed=1), EngineOptions(threads=1))), 3)


def test_the_report_holds_the_parts_and_the_gain(engine):
    report = measure_speculation(engine, [[1, 2, 3], [5, 6]], SamplingSettings(max_tokens=20), rounds=3)
    assert report.rounds == 3
    assert report.output_tokens == 40
    assert report.acceptance_rate == 1  # the draft is the target
    assert report.tokens_per_pass == pytest.approx(38 / 10)
    assert report.draft_cost_ratio > 0.3
    assert report.pass_cost_ratio > 0.5
    assert report.formula_speedup > report.expected_speedup or report.pass_cost_ratio < 1
    assert report.speedup > 0
    assert report.outcome in ("gain", "loss", "no clear difference")
    assert f"x{report.speedup:.2f}" in report.summary()


def test_other_tokens_are_an_error(engine, monkeypatch):
    monkeypatch.setattr("trilemma.runtime.speculative.choose", lambda *_: 7)
    with pytest.raises(EngineError, match="changed the answer"):
        measure_speculation(engine, [[1, 2]], SamplingSettings(max_tokens=6), rounds=3)


def test_nothing_to_measure(engine):
    with pytest.raises(InputError, match="at least one prompt"):
        measure_speculation(engine, [])


def test_a_draft_that_never_speaks(tiny_model):
    target = NativeEngine(tiny_model(seed=1), EngineOptions(threads=1))
    report = measure_speculation(
        SpeculativeEngine(target, LookupDraft(longest=60, shortest=59)),
        [[1, 2]],
        SamplingSettings(max_tokens=8),
        rounds=3,
    )
    assert report.acceptance_rate is None
    assert report.formula_speedup is None
    assert "expected" not in report.summary()
