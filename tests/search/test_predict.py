"""Bytes by arithmetic against the bytes that are really in the file, at odd shapes; times learned from builds."""

import json
import struct

import numpy as np
import pytest

from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.recipe import Recipe, Step
from trilemma.formats.artifact import read_artifact, weights_bytes, write_artifact
from trilemma.model.cost import parameter_count
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions
from trilemma.search.predict import BuildTimes, PredictedBytes, impossible, predict_bytes
from trilemma.search.space import candidates
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.technique import Build

MOST_ALIGNMENT = 64  # bytes of padding between two tensors of the file


def bytes_in_file(path):
    """(bytes of all tensors, number of tensors), from the header alone."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return sum(end - start for start, end in (entry["data_offsets"] for entry in header.values())), len(header)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"dim": 72, "ffn": 136, "heads": 3, "kv_heads": 1, "head_dim": 24, "vocab": 131, "tied": False},
        {"dim": 40, "ffn": 56, "head_dim": 10, "vocab": 33, "layers": 4, "qkv_bias": True},
    ],
)
def test_predicted_bytes_are_those_of_the_written_artifact(tiny_model, tmp_path, sizes):
    model = tiny_model(**sizes)
    windows = np.random.default_rng(0).integers(1, model.config.vocab_size, (2, 16)).astype(np.int32)
    for recipe in candidates(model.config):
        folder = tmp_path / recipe.name
        write_artifact(apply_recipe(model, recipe, Build(windows, 0, 1)), folder, recipe)
        predicted = predict_bytes(model, recipe, 64)
        assert predicted.weights_bytes == weights_bytes(read_artifact(folder)), recipe.name
        stored, tensors = bytes_in_file(folder / "model.safetensors")
        assert 0 <= stored - predicted.weights_bytes <= MOST_ALIGNMENT * tensors, recipe.name


@pytest.mark.parametrize("scheme", ["W4A8-g32", "W8A8-g32-kv8"])
def test_what_an_engine_takes_is_predicted_and_elsewhere_a_lower_bound_is(tiny_model, scheme):
    model, recipe = tiny_model(vocab=131), scheme_to_recipe(scheme)
    predicted = predict_bytes(model, recipe, 48)
    engine = open_engine(
        apply_recipe(model, recipe, Build(None, 0, 1)), options=EngineOptions(threads=1, max_context=48)
    )
    try:
        count = engine.memory()
    finally:
        engine.close()
    assert count.weights_bytes == predicted.weights_bytes
    assert predicted.least("engine_memory_bytes") == count.total_bytes
    other = predict_bytes(model, recipe, 48, runtime="torch")
    assert other.least("engine_memory_bytes") == predicted.weights_bytes + predicted.kv_bytes < count.total_bytes


def test_an_8_bit_cache_is_smaller(tiny_model):
    plain, eight = (predict_bytes(tiny_model(), scheme_to_recipe(s), 64) for s in ("W4A8-g32", "W4A8-g32-kv8"))
    assert eight.kv_bytes < plain.kv_bytes
    assert eight.weights_bytes == plain.weights_bytes
    assert plain.kv_bytes_per_token * 64 == plain.kv_bytes


def test_only_limits_on_bytes_drop_a_recipe():
    predicted = PredictedBytes(weights_bytes=600, kv_bytes=100, kv_bytes_per_token=2.0)
    known = {"weights_bytes": Measurement.of("weights_bytes", 1000)}

    def blocked(*texts):
        found = impossible(predicted, [Limit.parse(text) for text in texts], known)
        return None if found is None else found.text

    assert blocked("weights<=60%", "tpot<=1us", "kl<=0") is None
    assert blocked("tpot<=1us", "weights<=59%") == "weights<=59%"
    assert blocked("memory<=699B") == "memory<=699B"
    assert blocked("memory<=700B", "disk<=600B") is None
    assert blocked("kv_bytes_per_token<=1.5B") == "kv_bytes_per_token<=1.5B"
    assert blocked("peak_memory<=10%") is None  # nothing to be relative to


def test_build_times_are_learned_apart(tiny_model):
    model = tiny_model()
    times = BuildTimes(model)
    gptq, rtn = scheme_to_recipe("W4A8-g32-gptq"), scheme_to_recipe("W4A8-g32")
    assert times.expect_s(gptq) == pytest.approx(3e-6 * parameter_count(model.config))
    before = times.expect_s(rtn)
    times.learn(gptq, 50.0)
    assert (times.expect_s(gptq), times.expect_s(rtn)) == (50.0, before)
    times.learn(gptq, 10.0)
    assert times.expect_s(gptq) == 40.0
    assert times.expect_s(Recipe(steps=(Step(technique="kv-cache"),))) < 1e-3
