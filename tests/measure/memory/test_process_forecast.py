"""Process peaks: the arithmetic on sizes chosen by hand, and one real process."""

from __future__ import annotations

import pytest

from trilemma.core.errors import InputError
from trilemma.formats.artifact import load_any
from trilemma.measure.memory.forecast import (
    HUGE_PAGE,
    PEAK_ERROR,
    PEAK_ERROR_BYTES,
    READING_BYTES,
    REGION,
    forecast_memory,
    forecast_peak,
)
from trilemma.measure.memory.held import empty_process_bytes, peak_memory
from trilemma.runtime.engine import EngineOptions
from trilemma.runtime.memory_forecast import forecast_engine


def peak(model, context, tokens=None, **options):
    engine = forecast_engine(model, context=context)
    return forecast_peak(
        model.config, engine, model.format_of, tokens=tokens or context, empty_bytes=50_000_000, **options
    )


def test_the_head_is_read_while_little_else_is_held(tiny_model):
    """The layers come last, so the worst moment is reading the last of their matrices, not the larger head."""
    model = tiny_model(vocab=50_000, tied=False, ffn=20_000, layers=4)
    weights = forecast_engine(model, context=8).weights_bytes
    assert weights < REGION  # one gap
    assert peak(model, 8).loading_bytes == weights + 4 * 20_000 * 48 + READING_BYTES + HUGE_PAGE // 2


def test_what_reading_holds_is_asked_of_the_source(tiny_model):
    model = tiny_model()
    assert peak(model, 8, reading=lambda name: 10**9).loading_bytes > 10**9
    assert peak(model, 8, reading=lambda name: 10**9).when == "loading"


def test_only_written_pages_of_a_long_cache_count(tiny_model):
    model = tiny_model(context=1_000_000)
    long, short = peak(model, 1_000_000), peak(model, 1_000_000, tokens=1000)
    cache = forecast_engine(model, context=1_000_000).kv_bytes
    pages = 2 * 2 * 2 * 4096  # keys and values of 2 heads in 2 layers
    assert long.running_bytes - short.running_bytes == pytest.approx(0.999 * cache, abs=2 * pages)
    assert long.when == "running"


def test_figures_are_estimates_with_their_lengths(tiny_model):
    model = tiny_model()
    forecast = forecast_memory(model, prompt_tokens=40, output_tokens=8, empty_bytes=50_000_000)
    found = forecast.measurements(model.config)
    assert {item.source for item in found.values()} == {"estimated"}
    assert found["engine_memory_bytes"].value == forecast.engine.total_bytes
    low, high = found["peak_memory_bytes"].interval
    assert high - low == pytest.approx(2 * (PEAK_ERROR * forecast.process.peak_bytes + PEAK_ERROR_BYTES))
    assert found["peak_memory_bytes"].conditions["context"] == 48
    with pytest.raises(InputError, match="context of 65"):
        forecast_memory(model, prompt_tokens=60, output_tokens=5, empty_bytes=1)


def test_a_real_process_stays_within_the_bar(hearth_path):
    """Within 5% + 20 MB of VmHWM, and the engine to the byte."""
    measured = peak_memory(hearth_path, prompt_tokens=100, output_tokens=6, options=EngineOptions(threads=1))
    found = forecast_memory(load_any(hearth_path), prompt_tokens=100, output_tokens=6)
    assert found.engine.total_bytes == measured.conditions["engine_memory_bytes"]
    assert measured.conditions["context"] == 106
    assert found.process.peak_bytes == pytest.approx(measured.value, rel=PEAK_ERROR, abs=PEAK_ERROR_BYTES)
    assert (
        found.process.empty_process_bytes == empty_process_bytes("native") == measured.conditions["empty_process_bytes"]
    )
