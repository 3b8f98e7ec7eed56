"""The sweeps on tiny models: every point there, at its depth, with what it was measured under."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import InputError
from trilemma.core.results import BenchReport
from trilemma.measure.bench import BenchCandidate
from trilemma.measure.memory.kv_memory import longest_context
from trilemma.measure.timing import kv_sweep as kv_module
from trilemma.measure.timing.batch_sweep import batch_sweep
from trilemma.measure.timing.kv_sweep import kv_sweep
from trilemma.model.cost import attention_macs_per_token, kv_bytes, macs_per_token, prompt_macs
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions

ONE = EngineOptions(threads=1)


def tiny(tiny_model, **sizes):
    return BenchCandidate("tiny", "f32", tiny_model(**sizes), ONE)


def places(report):
    return [row.trial.measurements["engine_memory_bytes"].conditions for row in report.rows]


def test_every_policy_at_every_depth(tiny_model):
    report = kv_sweep(tiny(tiny_model), contexts=[33, 5, 64, 5], repetitions=3)
    assert BenchReport.model_validate_json(report.model_dump_json()) == report
    assert [(p["kv_cache"], p["context"]) for p in places(report)] == [
        (kv, depth) for kv in ("none", "bf16", "int8") for depth in (5, 33, 64)
    ]
    for row, place in zip(report.rows, places(report), strict=True):
        found = row.trial.measurements
        assert found["tpot_s"].value > 0
        assert len(found["tpot_s"].samples) == 3
        assert found["tpot_s"].conditions["context"] == place["context"]
        whole = place["weights_bytes"] + place["kv_bytes"] + place["scratch_bytes"]
        assert found["engine_memory_bytes"].value == whole
        assert place["sweep"] == "kv"
        assert place["form"] == "f32"
    held = {(p["kv_cache"], p["context"]): p["kv_bytes"] for p in places(report)}
    # whole tiles of positions are reserved: at least what arithmetic says
    config = tiny_model().config
    for kv in ("bf16", "int8"):
        assert kv_bytes(config, kv, 64) <= held[kv, 64] <= 2 * kv_bytes(config, kv, 64)
    assert held["int8", 64] < held["bf16", 64]
    assert any("recompute" in note and "cache bf16" in note for note in report.notes)


def test_a_step_is_at_its_depth(tiny_model, random_generator, monkeypatch):
    """The token that is timed sees exactly depth - 1 others: its logits are those of the whole text."""
    seen = {}
    forward = kv_module.SequenceBatch.forward

    def spy(self, steps):
        rows = forward(self, steps)
        if steps[0].logits == "last":
            depth = self.length(steps[0].sequence)
            seen.setdefault(depth, []).append(rows[0][-1])
        return rows

    monkeypatch.setattr(kv_module.SequenceBatch, "forward", spy)
    seed = int(random_generator.integers(1 << 30))
    model = tiny_model(seed=3)
    kv_sweep(BenchCandidate("t", "f32", model, ONE), policies=["none", "f32"], contexts=[1, 7, 40], repetitions=2,
             seed=seed)  # fmt: skip
    tokens = np.random.default_rng(seed).integers(0, 97, 40).astype(np.int32)
    engine = open_engine(model, options=EngineOptions(threads=1, kv_cache="f32"))
    assert set(seen) == {1, 7, 40}
    for depth, rows in seen.items():
        expected = engine.logits(tokens[:depth], last_only=True)[0]
        assert all(np.array_equal(row, expected) for row in rows)


def test_a_point_that_would_take_too_long_is_skipped(tiny_model, monkeypatch):
    def slow(self, depth):
        self.room.truncate(self.sequence, depth - 1)
        self.room.forward([kv_module.Step(self.sequence, self.prompt[depth - 1 : depth])])
        return 0.5 * depth if self.kv == "none" else 1e-3

    monkeypatch.setattr(kv_module._Policy, "step_s", slow)
    report = kv_sweep(tiny(tiny_model), policies=["none", "bf16"], contexts=[2, 8, 64], point_time_s=10, repetitions=5)
    found = {(p["kv_cache"], p["context"]): row.trial.measurements["tpot_s"]
             for row, p in zip(report.rows, places(report), strict=True)}  # fmt: skip
    assert found["none", 8].value == 4.0
    assert len(found["none", 8].samples) == 2  # as many as fit into ten seconds
    skipped = found["none", 64]
    assert skipped.source == "unavailable"
    expected = 4.0 * prompt_macs(tiny_model().config, 64) / prompt_macs(tiny_model().config, 8)
    assert f"skipped: would take about {expected:.0f} s" in skipped.reason
    assert found["bf16", 64].value == 1e-3
    # crossings are stated where both were measured
    assert report.notes[0].endswith("throughout: 1,000 times at 2 positions, 4,000 times at 8")


def test_recompute_counts_what_it_computes(tiny_model):
    model = tiny_model()
    config = model.config
    head = config.vocab_size * config.dim
    assert prompt_macs(model.config, 1) == macs_per_token(config, 1)
    # what a layer of its own costs is what a model of one layer less lacks; of the last one 39 tokens need keys alone
    last = config.layers[-1].attention
    shorter = config.model_copy(update={"layers": config.layers[:-1]})
    through = sum(macs_per_token(shorter, position + 1) - head for position in range(40))
    keys = 2 * last.kv_heads * last.head_dim * config.dim
    whole = macs_per_token(config, 40) - macs_per_token(shorter, 40)
    exact = through + 39 * keys + whole + head
    assert prompt_macs(model.config, 40) == pytest.approx(exact, rel=0.02)
    assert attention_macs_per_token(config, 4) > 0


@pytest.mark.parametrize("kv", ["none", "bf16", "int8"])
def test_the_longest_context_is_the_last_that_fits(tiny_model, kv):
    engine = open_engine(tiny_model(context=200), options=EngineOptions(threads=1, kv_cache=kv))

    def held(positions):
        return engine.open_sequences(1, max_context=positions).memory().total_bytes

    limit = (held(1) + held(200)) / 2
    found = longest_context(engine, limit)
    assert 1 <= found < 200
    assert held(found) <= limit < held(found + 1)
    assert longest_context(engine, held(200)) == 200
    assert longest_context(engine, held(1) - 1) == 0


def test_batches_share_the_weights(tiny_model):
    report = batch_sweep(tiny(tiny_model), batches=[4, 1, 2], prompt_tokens=6, output_tokens=5, repetitions=3)
    assert BenchReport.model_validate_json(report.model_dump_json()) == report
    assert [place["batch"] for place in places(report)] == [1, 2, 4]
    assert [row.trial.name for row in report.rows] == ["f32 x1", "f32 x2", "f32 x4"]
    for row, place in zip(report.rows, places(report), strict=True):
        found = row.trial.measurements
        for rate, ttft, tpot in zip(found["throughput_tokens_per_s"].samples, found["ttft_s"].samples,
                                    found["tpot_s"].samples, strict=True):  # fmt: skip
            assert rate == pytest.approx(5 * place["batch"] / (ttft + 4 * tpot))
    weights = {place["weights_bytes"] for place in places(report)}
    kv = [place["kv_bytes"] for place in places(report)]
    assert len(weights) == 1
    assert kv[1] == 2 * kv[0]
    assert kv[2] == 4 * kv[0]
    assert "4 sequences instead of 1: throughput x" in report.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": [65]}, "65 is longer than the 64"),
        ({"contexts": [0, 3]}, "context of 0"),
        ({"contexts": []}, "no depths"),
        ({"policies": ["fp8"]}, "fp8"),
        ({"policies": []}, "no cache policies"),
        ({"contexts": [4], "runtime": "torch"}, "one sequence at a time"),
    ],
)
def test_depths_that_can_not_be_measured(tiny_model, options, message):
    with pytest.raises(InputError, match=message):
        kv_sweep(tiny(tiny_model), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": [0]}, "batch of 0"),
        ({"batches": []}, "no batches"),
        ({"prompt_tokens": 60, "output_tokens": 5}, "65 tokens"),
        ({"prompt_tokens": 6, "output_tokens": 1}, "2 output"),
        ({"prompt_tokens": 6, "output_tokens": 4, "batches": [1 << 40]}, "GB"),
        ({"prompt_tokens": 6, "output_tokens": 4, "runtime": "torch"}, "one sequence at a time"),
    ],
)
def test_batches_that_can_not_be_measured(tiny_model, options, message):
    with pytest.raises(InputError, match=message):
        batch_sweep(tiny(tiny_model), **options)
