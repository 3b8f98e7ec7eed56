"""What every registered engine promises: logits as the torch decoder's, and the same answer however it is asked.

Tolerances are of the largest logit. f32 arithmetic in another order of sums differs in the last bits only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trilemma.core.errors import InputError, MissingExtraError, UnsupportedModelError
from trilemma.formats.gguf.metadata import read_shape
from trilemma.runtime import ENGINES, EngineOptions, SamplingSettings, open_engine
from trilemma.runtime.llama_cpp_process import interpreter

F32_TOLERANCE = 2e-5
TOLERANCE = {"torch-f16": 1e-2, "torch-bf16": 5e-2}  # of engines that compute in 16 bits
BYTES = {"torch-f16": 2, "torch-bf16": 2}  # of a weight held
ALWAYS_CACHED = {"llama.cpp"}  # engines without the cache policy 'none'
BIT_EQUAL = {"native"}  # engines whose results do not depend on how many tokens are computed at once
KV_TOLERANCE = {"none": 2e-5, "f32": 2e-5, "bf16": 2e-2, "int8": 6e-2, "int4": 0.6}
MODELS: list[dict[str, Any]] = [
    {},
    {"qkv_bias": True, "tied": False, "dim": 40, "heads": 5, "kv_heads": 1, "head_dim": 12},
]


@pytest.fixture(params=MODELS, ids=["tied", "biased"])
def model(request, tiny_model):
    return tiny_model(seed=5, **request.param)


@pytest.fixture(params=ENGINES.names())
def runtime(request, model):
    if request.param == "llama.cpp":
        try:
            interpreter()
            read_shape(model.config)
        except (MissingExtraError, UnsupportedModelError) as refused:
            pytest.skip(str(refused))
    return request.param


def tokens_for(model, count: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, model.config.vocab_size, count).astype(np.int32)


@pytest.mark.parametrize("kv_cache", ["none", "f32", "bf16", "int8", "int4"])
def test_logits_agree_with_the_reference(model, runtime, kv_cache):
    tokens = tokens_for(model, 23)
    wanted = open_engine(model, runtime="torch", options=EngineOptions(kv_cache="none")).logits(tokens)
    try:
        engine = open_engine(model, runtime=runtime, options=EngineOptions(kv_cache=kv_cache))
    except InputError as refused:
        pytest.skip(f"{runtime} has no {kv_cache} cache: {refused}")
    found = engine.logits(tokens)
    last = engine.logits(tokens, last_only=True)
    engine.close()
    assert found.shape == (23, model.config.vocab_size)
    assert found.dtype == np.float32
    if runtime in BIT_EQUAL:
        np.testing.assert_array_equal(last, found[-1:])
    tolerance = TOLERANCE.get(runtime, F32_TOLERANCE)
    np.testing.assert_allclose(last, found[-1:], atol=tolerance * np.abs(wanted).max())
    assert np.abs(found - wanted).max() <= max(tolerance, KV_TOLERANCE[kv_cache]) * np.abs(wanted).max()


def test_cached_and_recomputed_give_the_same_tokens(model, runtime):
    prompt = [int(token) for token in tokens_for(model, 7)]
    settings = SamplingSettings(max_tokens=20, ignore_eos=True)
    answers = []
    for kv_cache in ("none", "f32"):
        if runtime in ALWAYS_CACHED and kv_cache == "none":
            pytest.skip(f"{runtime} always keeps a cache")
        engine = open_engine(model, runtime=runtime, options=EngineOptions(kv_cache=kv_cache))
        answers.append(engine.generate(prompt, settings).tokens)
        engine.close()
    assert runtime in TOLERANCE or answers[0] == answers[1]
    assert len(answers[0]) == len(answers[1]) == 20


def test_greedy_is_the_largest_logit_of_the_whole_text(model, runtime):
    engine = open_engine(model, runtime=runtime, options=EngineOptions(kv_cache="f32"))
    prompt = [int(token) for token in tokens_for(model, 5)]
    seen: list[int] = []
    generation = engine.generate(prompt, SamplingSettings(max_tokens=12, ignore_eos=True), seen.append)
    text = [*prompt, *generation.tokens]
    logits = engine.logits(text[:-1])[len(prompt) - 1 :]
    engine.close()
    assert seen == generation.tokens
    for row, token in zip(logits, generation.tokens, strict=True):
        assert row[token] >= row.max() - TOLERANCE.get(runtime, 1e-4) * np.abs(row).max()
    assert generation.finish_reason == "length"
    assert generation.prompt_tokens == 5
    assert generation.token_times_s == sorted(generation.token_times_s)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_sample_on_any_number_of_threads(model, runtime, threads):
    settings = SamplingSettings(max_tokens=15, temperature=0.9, top_k=20, top_p=0.9, seed=11, ignore_eos=True)
    answers = []
    for count in (1, threads):
        engine = open_engine(model, runtime=runtime, options=EngineOptions(threads=count))
        answers.append(engine.generate([3, 1, 4], settings).tokens)
        engine.close()
    assert answers[0] == answers[1]


def test_a_callback_stops_and_stop_ids_end(model, runtime):
    engine = open_engine(model, runtime=runtime)
    free = engine.generate([5, 6], SamplingSettings(max_tokens=10, ignore_eos=True))
    seen: list[int] = []

    def three(token: int) -> bool:
        seen.append(token)
        return len(seen) < 3

    stopped = engine.generate([5, 6], SamplingSettings(max_tokens=10, ignore_eos=True), three)
    assert stopped.tokens == free.tokens[:3]
    assert stopped.finish_reason == "interrupted"
    stop = SamplingSettings(max_tokens=10, stop_token_ids=(free.tokens[2],))
    ended = engine.generate([5, 6], stop)
    engine.close()
    assert ended.finish_reason == "stop"
    assert free.tokens[2] not in ended.tokens[:-1]


def test_bad_requests_are_refused(model, runtime):
    engine = open_engine(model, runtime=runtime, options=EngineOptions(max_context=16))
    for wrong in ([], [-1], [model.config.vocab_size], [1] * 17):
        with pytest.raises(InputError):
            engine.logits(wrong)
    with pytest.raises(InputError):
        engine.generate([], SamplingSettings())
    with pytest.raises(InputError):
        engine.generate([1] * 17, SamplingSettings())
    engine.close()
    with pytest.raises(InputError):
        open_engine(model, runtime=runtime, options=EngineOptions(max_context=model.config.max_context + 1))


def test_it_counts_its_memory(model, runtime):
    engine = open_engine(model, runtime=runtime)
    memory = engine.memory()
    parameters = sum(int(np.prod(shape)) for shape in model.config.tensor_shapes().values())
    assert memory.weights_bytes >= BYTES.get(runtime, 4) * parameters * 0.99
    assert memory.total_bytes == memory.weights_bytes + memory.kv_bytes + memory.scratch_bytes
    engine.close()
