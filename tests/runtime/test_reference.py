"""The torch engine: caches, rounding, generation and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trilemma.core.errors import InputError
from trilemma.model.decoder import Decoder
from trilemma.model.model import LinearRun, RunSettings
from trilemma.model.plain import bf16_to_f32, f32_to_bf16
from trilemma.runtime.engine import EngineOptions, SamplingSettings
from trilemma.runtime.reference import ReferenceEngine, round_bf16, round_int8, round_int8_groups, round_int8_shared


def _engine(model, **options) -> ReferenceEngine:
    return ReferenceEngine(model, EngineOptions(threads=1, **options))


def _prompt(model, generator, length: int) -> list[int]:
    return generator.integers(0, model.config.vocab_size, length).tolist()


def test_exact_modes_equal_the_decoder(tiny_model, random_generator):
    model = tiny_model(seed=3, tied=False)
    tokens = _prompt(model, random_generator, 23)
    with torch.no_grad():
        expected = Decoder.from_model(model)(torch.tensor([tokens]))[0].numpy()
    for kv in ("none", "f32"):
        engine = _engine(model, kv_cache=kv)
        np.testing.assert_allclose(engine.logits(tokens), expected, atol=2e-5)
        np.testing.assert_allclose(engine.logits(np.array(tokens, np.int32), last_only=True), expected[-1:], atol=2e-5)


@pytest.mark.parametrize("kv", ["none", "f32", "bf16", "int8", "int4"])
def test_cached_steps_equal_the_whole(tiny_model, random_generator, kv):
    """Greedy generation, one cached step at a time, picks what whole recomputation picks."""
    model = tiny_model(seed=int(random_generator.integers(1000)))
    engine = _engine(model, kv_cache=kv)
    tokens = _prompt(model, random_generator, 5)
    for token in engine.generate(tokens, SamplingSettings(max_tokens=20)).tokens:
        logits = engine.logits(tokens, last_only=True)[0]
        assert logits[token] > logits.max() - 1e-4
        tokens.append(token)


@pytest.mark.parametrize(("kv", "low", "high"), [("bf16", 1e-5, 0.1), ("int8", 1e-5, 0.3), ("int4", 1e-3, 3.0)])
def test_kv_rounding_changes_a_little(tiny_model, random_generator, kv, low, high):
    model = tiny_model(seed=1)
    tokens = _prompt(model, random_generator, 30)
    difference = np.abs(_engine(model, kv_cache=kv).logits(tokens) - _engine(model, kv_cache="f32").logits(tokens))
    assert low < difference.max() < high * 5
    by_settings = _engine(model.with_run(RunSettings(kv_cache=kv)))
    assert by_settings.kv_cache == kv


@pytest.mark.parametrize("name", ["layers.1.ffn.down.weight", "layers.0.attention.q.weight", "head.weight"])
@pytest.mark.parametrize("activation", ["bf16", "int8-g32"])
def test_activation_rounding_is_per_matrix(tiny_model, random_generator, name, activation):
    """Against an oracle that rounds the hooked module's input in numpy and multiplies by hand."""
    model = tiny_model(seed=2, tied=False)
    changed = model.with_tensors({}, {name: LinearRun(activation=activation)})
    engine = _engine(changed, kv_cache="none")
    module = engine._decoder.get_submodule(name.removesuffix(".weight"))
    inputs, outputs = [], []
    before = _engine(model, kv_cache="none")
    before._decoder.get_submodule(name.removesuffix(".weight")).register_forward_hook(
        lambda _m, args, _o: inputs.append(args[0][0].clone())
    )
    module.register_forward_hook(lambda _m, _a, out: outputs.append(out[0].clone()))
    tokens = _prompt(model, random_generator, 9)
    exact, rounded = before.logits(tokens), engine.logits(tokens)
    expected = _round_plainly(inputs[0].numpy(), activation) @ model.tensor(name).T
    np.testing.assert_allclose(outputs[0].numpy(), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(exact - rounded).max() > 1e-5


def _round_plainly(x: np.ndarray, activation: str, *, shared: bool = False) -> np.ndarray:
    if activation == "bf16":
        return bf16_to_f32(f32_to_bf16(x))
    out = np.zeros_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 32):
            group = x[row, start : start + 32]
            scale = np.abs(group).max() / 127
            if shared and scale:
                whole = np.abs(x[row]).max() / 127
                scale = whole / 2 ** min(30, math.floor(math.log2(whole / scale)))
            out[row, start : start + 32] = np.rint(group / scale) * scale if scale else 0
    return out


def test_a_tied_head_is_rounded_by_the_embedding_s_setting(tiny_model, random_generator):
    model = tiny_model(seed=4, tied=True)
    tokens = _prompt(model, random_generator, 6)
    changed = model.with_tensors({}, {"embedding.weight": LinearRun(activation="int8-g32")})
    difference = _engine(changed).logits(tokens) - _engine(model).logits(tokens)
    assert 1e-4 < np.abs(difference).max() < 1


def test_rounding_functions(random_generator):
    x = torch.from_numpy(random_generator.normal(0, 2, (5, 172)).astype(np.float32))
    x[2] = 0
    np.testing.assert_allclose(round_int8_groups(x).numpy(), _round_plainly(x.numpy(), "int8-g32"), atol=1e-6)
    x[3, 40:70] *= 1e-3  # groups far below their row's largest value
    np.testing.assert_allclose(
        round_int8_shared(x).numpy(), _round_plainly(x.numpy(), "int8-g32", shared=True), atol=1e-6
    )
    np.testing.assert_array_equal(round_bf16(x).numpy(), bf16_to_f32(f32_to_bf16(x.numpy())))
    codes = round_int8(torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.5]]))
    assert codes.tolist() == [[127.0, 0.0, 2.0, -2.0, -126.0]]  # half to even


def test_generation_ends(tiny_model, random_generator):
    model = tiny_model(seed=6, context=32)
    engine = _engine(model)
    prompt = _prompt(model, random_generator, 4)
    free = engine.generate(prompt, SamplingSettings(max_tokens=100))
    assert (free.finish_reason, len(free.tokens), free.prompt_tokens) == ("context", 28, 4)
    assert free.token_times_s == sorted(free.token_times_s)
    assert len(free.token_times_s) == 28
    short = engine.generate(prompt, SamplingSettings(max_tokens=5))
    assert (short.finish_reason, short.tokens) == ("length", free.tokens[:5])
    stop = free.tokens[3]
    stopped = engine.generate(prompt, SamplingSettings(max_tokens=20, stop_token_ids=(stop,)))
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: free.tokens.index(stop)]
    seen: list[int] = []
    cut = engine.generate(prompt, SamplingSettings(max_tokens=20), lambda t: seen.append(t) or len(seen) < 3)
    assert (cut.finish_reason, cut.tokens, seen) == ("interrupted", free.tokens[:3], free.tokens[:3])


def test_end_of_text_stops_unless_ignored(tiny_model, random_generator):
    model = tiny_model(seed=7)
    prompt = _prompt(model, random_generator, 4)
    first = _engine(model).generate(prompt, SamplingSettings(max_tokens=8)).tokens
    ending = model.with_config(model.config.model_copy(update={"eos_token_ids": (first[0],)}))
    assert _engine(ending).generate(prompt, SamplingSettings(max_tokens=8)).tokens == []
    assert _engine(ending).generate(prompt, SamplingSettings(max_tokens=8, ignore_eos=True)).tokens == first


def test_sampling_is_seeded(tiny_model, random_generator):
    model = tiny_model(seed=8)
    engine, prompt = _engine(model), _prompt(model, random_generator, 4)
    runs = [engine.generate(prompt, SamplingSettings(max_tokens=12, temperature=2.0, seed=s)).tokens for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_refusals(tiny_model):
    model = tiny_model(context=16)
    engine = _engine(model)
    with pytest.raises(InputError, match="no tokens"):
        engine.logits([])
    with pytest.raises(InputError, match="no tokens"):
        engine.generate([], SamplingSettings())
    with pytest.raises(InputError, match=r"Token 97 .*0\.\.96"):
        engine.logits([1, 97])
    with pytest.raises(InputError, match=r"17 tokens .* 16"):
        engine.logits([1] * 17)
    with pytest.raises(InputError, match="fill the context"):
        engine.generate([1] * 16, SamplingSettings())
    with pytest.raises(InputError, match="longer than the model's 16"):
        _engine(model, max_context=17)
    with pytest.raises(InputError, match="isa"):
        _engine(model, isa="avx2")
    assert _engine(model, max_context=8).max_context == 8


def test_memory_is_counted(tiny_model):
    model = tiny_model()
    memory = _engine(model, kv_cache="bf16").memory()
    assert memory.weights_bytes == 4 * sum(int(np.prod(s)) for s in model.config.tensor_shapes().values())
    assert memory.kv_bytes == 64 * 2 * 2 * 2 * 16 * 4
    assert _engine(model, kv_cache="none").memory().kv_bytes == 0
