"""The three entries on the shipped model and small random ones."""

from __future__ import annotations

import pytest

from trilemma.core.errors import DataError, InputError
from trilemma.core.metric import resolve_metric
from trilemma.core.results import BenchReport
from trilemma.measure import METERS
from trilemma.measure.bench import BenchCandidate, bench, decode_bytes
from trilemma.measure.compare import compare
from trilemma.measure.device.ceilings import read_bandwidth, roofline_share
from trilemma.measure.quality.evaluate import evaluate
from trilemma.measure.results import CompareResult, EvaluateResult
from trilemma.runtime.engine import EngineOptions


def test_bench_counts_times_and_states_the_roofline(hearth_path, tiny_model):
    small = BenchCandidate("tiny", "f32", tiny_model())
    report = bench(
        [hearth_path, small], prompt_tokens=12, output_tokens=5, repetitions=2, options=EngineOptions(threads=1)
    )
    assert BenchReport.model_validate_json(report.model_dump_json()) == report
    assert [(row.model, row.trial.name) for row in report.rows] == [("hearth-7m", "bf16"), ("tiny", "f32")]
    found = report.rows[0].trial.measurements
    assert found["weights_bytes"].value == pytest.approx(13.64e6, rel=0.01)
    assert found["engine_memory_bytes"].conditions["context"] == 17
    conditions = found["decode_tokens_per_s"].conditions
    share = conditions["decode_bytes_per_token"] * found["decode_tokens_per_s"].value
    assert conditions["roofline_share"] == pytest.approx(share / conditions["read_bandwidth_bytes_per_s"])
    assert 0 < conditions["roofline_share"] < 1.5
    assert report.environment.threads == 1


def test_bench_of_several_options_and_a_bare_config(hearth_path, tmp_path):
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text((hearth_path / "config.json").read_text())
    options = [EngineOptions(kv_cache="bf16"), EngineOptions(kv_cache="int8")]
    report = bench(tmp_path / "shape" / "config.json", options=options, prompt_tokens=4, output_tokens=3, repetitions=1)
    assert [row.model for row in report.rows] == ["shape", "shape"]
    assert all(row.random_weights for row in report.rows)
    bf16, int8 = (row.trial.measurements["kv_bytes_per_token"].value for row in report.rows)
    assert int8 < bf16


def test_decode_bytes_leave_out_the_unused_embedding(tiny_model):
    tied, untied = tiny_model(tied=True), tiny_model(tied=False)
    extra = decode_bytes(untied, "none", 1) - decode_bytes(tied, "none", 1)
    assert extra == 48 * 4  # one row of the embedding
    assert decode_bytes(tied, "f32", 3) - decode_bytes(tied, "none", 3) == 3 * 2 * 2 * 2 * 16 * 4


def test_bandwidth_is_plausible():
    found = read_bandwidth(1, 4_000_000)
    assert 1e8 < found.bytes_per_s < 2e12
    assert roofline_share(1e6, 100, found._replace(bytes_per_s=1e9)) == pytest.approx(0.1)


def test_evaluate_by_domain_and_against_itself(hearth_path, texts_path, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(
        "<|endoftext|>".join(f"The weather on day {n} was fine, and nobody went out. " * 8 for n in range(9))
    )
    result = evaluate(
        hearth_path, {"books": texts_path, "weather": other}, reference=hearth_path, context=64, max_tokens=1500
    )
    assert EvaluateResult.model_validate_json(result.model_dump_json()) == result
    assert [row.domain for row in result.rows] == ["all", "books", "weather"]
    everything, books, weather = result.rows
    assert everything.tokens == books.tokens + weather.tokens
    assert everything.measurements["kl_mean"].value < 1e-4
    low, high = books.measurements["perplexity"].ci95
    assert low < books.measurements["perplexity"].value < high
    alone = evaluate(hearth_path, {"books": texts_path}, context=64, max_tokens=1500)
    assert set(alone.rows[0].measurements) == {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert alone.rows[0].measurements["perplexity"].value == pytest.approx(
        books.measurements["perplexity"].value, rel=1e-6
    )


def test_evaluate_refuses_what_it_can_not_use(hearth_path, texts_path, tiny_model):
    with pytest.raises(InputError, match="longer than the model's 512"):
        evaluate(hearth_path, texts_path, context=1024)
    with pytest.raises(DataError, match="--data"):
        evaluate(hearth_path, [])
    with pytest.raises(InputError, match="no tokenizer"):
        evaluate(tiny_model(), texts_path)


def test_compare_pairs_everything_to_the_first(hearth_path, texts_path):
    result = compare(
        [hearth_path, hearth_path],
        texts_path,
        context=64,
        max_tokens=600,
        prompt_tokens=8,
        output_tokens=4,
        repetitions=3,
    )
    assert CompareResult.model_validate_json(result.model_dump_json()) == result
    first, second = result.rows
    # one kept repetition (a busy host sets others aside) has no interval
    kept = first.measurements["tpot_s"].n
    assert first.relative["tpot_s"] == ((1, 1, 1) if kept > 1 else (1, None, None))
    assert second.relative["weights_bytes"] == (1, 1, 1)
    assert second.relative["tpot_s"][0] > 0
    assert second.measurements["top1_agreement"].value > 0.98
    assert second.measurements["artifact_bytes"].value > 13e6
    with pytest.raises(InputError, match="two or more"):
        compare([hearth_path])


@pytest.mark.parametrize("name", METERS.names())
def test_every_meter_exists_and_measures_a_known_metric(name):
    assert resolve_metric(name).name == name
    assert callable(METERS.get(name))


def test_bench_names_lengths_that_do_not_fit(hearth_path):
    with pytest.raises(InputError, match="600 prompt and 8 output tokens do not fit the context of 512"):
        bench([hearth_path], prompt_tokens=600, output_tokens=8)
