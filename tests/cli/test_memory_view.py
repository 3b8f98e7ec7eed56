"""`inspect` says what a model would hold, before it is loaded, and what the numbers are."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from trilemma.cli.main import app
from trilemma.core.errors import InputError
from trilemma.formats.artifact import load_any
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions


def ask(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_schemes_side_by_side(hearth_path):
    given = (hearth_path, "--prompt", 100, "--output", 20, "--kv", "int8", "--scheme", "as it is,W4A8-g32")
    found = json.loads(ask(*given, "--threads", 1, "--json"))["memory"]
    assert list(found) == ["as it is", "W4A8-g32"]
    plain, packed = (found[scheme]["measurements"] for scheme in found)
    engine = open_engine(load_any(hearth_path), options=EngineOptions(kv_cache="int8", max_context=120))
    try:
        assert plain["engine_memory_bytes"]["value"] == engine.memory().total_bytes
    finally:
        engine.close()
    assert packed["peak_memory_bytes"]["value"] < plain["peak_memory_bytes"]["value"]
    assert {item["source"] for item in (*plain.values(), *packed.values())} == {"estimated"}
    shown = ask(*given)
    assert "Memory for 100 prompt and 20 output tokens" in shown
    assert "W4A8-g32" in shown
    assert "nothing was loaded" in shown


@pytest.mark.parametrize("shape", ["SmolLM2-135M", "Llama-3.2-1B"])
def test_a_bare_shape(shapes_path, shape):
    found = json.loads(ask(shapes_path / shape, "--prompt", 512, "--output", 128, "--json"))["memory"]["as it is"]
    parts = found["forecast"]["engine"]
    assert parts["context"] == 640
    assert found["measurements"]["weights_bytes"]["value"] == parts["weights_bytes"] > 2e8
    assert found["forecast"]["process"]["empty_process_bytes"] > 1e7


def test_the_plain_view_has_one_line(hearth_path):
    engine = open_engine(load_any(hearth_path), options=EngineOptions(max_context=160))
    try:
        megabytes = engine.memory().total_bytes / 1e6  # chunks, and with them scratch, depend on the instruction set
    finally:
        engine.close()
    assert f"engine memory ~{megabytes:.1f} MB for 160 tokens, KV cache bf16" in ask(hearth_path)


def test_lengths_that_do_not_fit_are_refused(hearth_path):
    with pytest.raises(InputError, match="context of 600 is not possible"):
        ask(hearth_path, "--prompt", 580, "--output", 20)
