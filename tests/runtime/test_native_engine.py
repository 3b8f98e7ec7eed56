"""The native engine's promises: one answer whatever the threads, set, batch and chunks; KV types; memory; errors."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from trilemma import _native
from trilemma.core.errors import CheckpointError, EngineError, InputError, UnsupportedModelError
from trilemma.formats import FORMATS
from trilemma.formats.pack import pack
from trilemma.formats.quantize import quantize_rtn
from trilemma.formats.random_weights import random_matrix
from trilemma.model.config import Dense, LayerSpec, with_low_rank
from trilemma.model.model import LinearRun, Model
from trilemma.model.plain import PlainMatrix, f32_to_bf16
from trilemma.runtime import EngineOptions, SamplingSettings
from trilemma.runtime.native import NativeEngine, Step, supported_isas
from trilemma.runtime.reference import ReferenceEngine
from trilemma.runtime.sampling import choose

ISAS = supported_isas()
KV = ["none", "f32", "bf16", "int8", "int4"]
ODD = {"dim": 60, "heads": 6, "kv_heads": 2, "head_dim": 8, "ffn": 172, "vocab": 511, "context": 192}


def quantized(model: Model, format_name: str, activation: str) -> Model:
    """Every matrix, the embedding included, in one format."""
    spec = FORMATS.get(format_name)
    names = [name for name, shape in model.config.tensor_shapes().items() if len(shape) == 2]
    if spec.supergroup is None:
        tensors = {name: quantize_rtn(model.tensor(name), spec) for name in names}
    else:
        shapes = model.config.tensor_shapes()
        tensors = {name: random_matrix(spec, shapes[name], seed) for seed, name in enumerate(names)}
    return model.with_tensors(tensors, {name: LinearRun(activation=activation) for name in names})


def tokens_for(model: Model, rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, model.config.vocab_size, count).astype(np.int32)


def context_of(model: Model, **settings) -> _native.Context:
    from trilemma.runtime.native import load_weights

    defaults = {"threads": 1, "isa": "", "kv_cache": "bf16", "max_context": model.config.max_context}
    return _native.Context(load_weights(model), **(defaults | settings))


@pytest.fixture(params=[("f32", 0), ("int8-channel", 0), ("int4-g32-asym", 0), ("f32", 5), ("int8-g32", 40)], ids=str)
def odd_model(request, tiny_model, random_model) -> Model:
    """Of some format, perhaps with low-rank pairs."""
    format_name, rank = request.param
    model = tiny_model(seed=3, **ODD)
    if rank:
        model = random_model(with_low_rank(model.config, rank), 3)
    return model if format_name == "f32" else quantized(model, format_name, "int8-g32")


@pytest.mark.parametrize("kv", KV)
def test_logits_are_bit_equal_however_they_are_computed(odd_model, random_generator, kv):
    tokens = tokens_for(odd_model, random_generator, 150)
    whole = NativeEngine(odd_model, EngineOptions(kv_cache=kv, threads=1)).logits(tokens)
    # Processors' own products of a bf16 cache each round in their own way.
    isas = ISAS[-1:] if kv == "bf16" and ISAS[-1] in ("avx512bf16", "amx") else ISAS
    for isa in isas:
        for threads in (1, 2):
            engine = NativeEngine(odd_model, EngineOptions(kv_cache=kv, isa=isa, threads=threads))
            np.testing.assert_array_equal(engine.logits(tokens), whole)
    for chunk in (1, 7, 64):
        context = context_of(odd_model, kv_cache=kv, chunk=chunk, threads=2)
        np.testing.assert_array_equal(context.forward([(context.create(), tokens, "all")]), whole)
    context = context_of(odd_model, kv_cache=kv)
    sequence = context.create()
    parts = [context.forward([(sequence, part, "all")]) for part in np.split(tokens, [1, 2, 40, 130, 149])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kv", KV)
def test_a_sequence_in_a_batch_gets_the_logits_it_gets_alone(odd_model, random_generator, kv):
    engine = NativeEngine(odd_model, EngineOptions(kv_cache=kv))
    texts = [tokens_for(odd_model, random_generator, count) for count in (90, 3, 17)]
    alone = [engine.logits(text) for text in texts]
    batch = engine.open_sequences(4)
    ids = [batch.create() for _ in texts]
    first = batch.forward([Step(i, text[:-2], "all") for i, text in zip(ids, texts, strict=True)])
    none = batch.forward([Step(ids[0], texts[0][-2:-1], "none"), Step(ids[2], texts[2][-2:], "all")])
    last = batch.forward([Step(ids[1], texts[1][-2:], "last"), Step(ids[0], texts[0][-1:])])
    for wanted, found in zip(alone, first, strict=True):
        np.testing.assert_array_equal(found, wanted[:-2])
    assert none[0].shape == (0, odd_model.config.vocab_size)
    np.testing.assert_array_equal(none[1], alone[2][-2:])
    np.testing.assert_array_equal(last[0], alone[1][-1:])
    np.testing.assert_array_equal(last[1], alone[0][-1:])


@pytest.mark.parametrize("kv", KV)
def test_sequences_fork_truncate_and_are_given_back(tiny_model, random_generator, kv):
    model = tiny_model(seed=8, **ODD)
    engine = NativeEngine(model, EngineOptions(kv_cache=kv))
    text, other = tokens_for(model, random_generator, 45), tokens_for(model, random_generator, 5)
    batch = engine.open_sequences(2)
    first = batch.create()
    batch.forward([Step(first, text)])
    copy = batch.fork(first)
    with pytest.raises(InputError, match="All 2 sequences"):
        batch.create()
    found = batch.forward([Step(copy, other, "all")])[0]
    np.testing.assert_array_equal(found, engine.logits(np.concatenate([text, other]))[45:])
    assert (batch.length(first), batch.length(copy)) == (45, 50)
    batch.truncate(first, 20)
    again = batch.forward([Step(first, other, "all")])[0]
    np.testing.assert_array_equal(again, engine.logits(np.concatenate([text[:20], other]))[20:])
    batch.release(copy)
    assert batch.length(batch.create()) == 0
    for wrong in ([Step(5, [1])], [Step(first, [1]), Step(first, [2])], [Step(first, [1] * 200)], [Step(first, [])]):
        with pytest.raises(InputError):
            batch.forward(wrong)
    assert batch.length(first) == 25  # a refused step changes nothing


@pytest.mark.parametrize("format_name", FORMATS.names())
@pytest.mark.parametrize("activation", ["f32", "bf16", "int8-g32"])
def test_every_format_agrees_with_the_reference(tiny_model, random_generator, format_name, activation):
    plain = FORMATS.get(format_name).floating
    if plain and activation == "int8-g32":
        pytest.skip("int8 activations belong to quantized weights")
    model = tiny_model(seed=6, tied=False, qkv_bias=True, dim=72, ffn=172)
    make = stored_plain if plain else quantized
    model = make(model, format_name, activation)
    reference, engine = (kind(model, EngineOptions(kv_cache="f32")) for kind in (ReferenceEngine, NativeEngine))
    apart = []
    for _ in range(3):
        tokens = tokens_for(model, random_generator, 40)
        wanted = reference.logits(tokens)
        apart.append(np.abs(engine.logits(tokens) - wanted).max() / np.abs(wanted).max())
    if activation == "f32":
        assert max(apart) <= 2e-5
    else:  # a value on the edge between two activation codes may fall to either side: in one text, not in most
        assert np.median(apart) <= 2e-2


def stored_plain(model: Model, dtype: str, activation: str) -> Model:
    def convert(values: np.ndarray) -> PlainMatrix:
        if dtype == "bf16":
            return PlainMatrix("bf16", f32_to_bf16(values))
        return PlainMatrix(dtype, values.astype(np.float16 if dtype == "f16" else np.float32))

    names = [name for name, shape in model.config.tensor_shapes().items() if len(shape) == 2]
    tensors = {name: convert(model.tensor(name)) for name in names}
    return model.with_tensors(tensors, {name: LinearRun(activation=activation) for name in names})


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward_variants_windows_and_missing_parts(tiny_model, random_generator, activation, gated):
    base = tiny_model(seed=4, **ODD).config
    attention = base.layers[0].attention
    single = attention.model_copy(update={"kv_heads": 1, "o_bias": True, "rope": None})
    layers = (
        LayerSpec(attention=attention.model_copy(update={"window": 9}), ffn=None),
        LayerSpec(attention=None, ffn=Dense(hidden=52, activation=activation, gated=gated, bias=True)),
        LayerSpec(attention=single, ffn=base.layers[0].ffn),
    )
    config = base.model_copy(update={"layers": layers})
    model = Model(config, type(tiny_model(seed=4).source)(config, 11))
    tokens = tokens_for(model, random_generator, 150)
    wanted = ReferenceEngine(model, EngineOptions(kv_cache="f32")).logits(tokens)
    engine = NativeEngine(model, EngineOptions(kv_cache="f32"))
    assert np.abs(engine.logits(tokens) - wanted).max() <= 2e-5 * np.abs(wanted).max()
    for isa in ISAS:
        other = NativeEngine(model, EngineOptions(kv_cache="f32", isa=isa))
        np.testing.assert_array_equal(other.logits(tokens), engine.logits(tokens))


def test_sampling_is_that_of_the_reference(tiny_model, random_generator):
    model = tiny_model(seed=2, vocab=300)
    engine = NativeEngine(model, EngineOptions(kv_cache="f32"))
    for trial in range(12):
        settings = SamplingSettings(
            max_tokens=12, temperature=float(random_generator.choice([0.0, 0.7, 1.5])),
            top_k=int(random_generator.choice([0, 1, 40])), top_p=float(random_generator.choice([1.0, 0.8])),
            min_p=float(random_generator.choice([0.0, 0.05])),
            repetition_penalty=float(random_generator.choice([1.0, 1.3])), seed=trial, ignore_eos=True,
        )  # fmt: skip
        prompt = tokens_for(model, random_generator, 6).tolist()
        text = prompt + engine.generate(prompt, settings).tokens
        logits = engine.logits(text)
        for at in range(len(prompt), len(text)):
            assert text[at] == choose(logits[at - 1], text[:at], settings)


def test_generation_ends_for_its_reason(tiny_model):
    model = tiny_model(seed=2, context=16)
    engine = NativeEngine(model, EngineOptions(max_context=12))
    full = engine.generate([1, 2, 3], SamplingSettings(max_tokens=100, ignore_eos=True))
    assert (full.finish_reason, len(full.tokens), len(full.token_times_s)) == ("context", 9, 9)
    stop = engine.generate([1, 2, 3], SamplingSettings(max_tokens=100, stop_token_ids=(full.tokens[4],)))
    assert (stop.finish_reason, stop.tokens) == ("stop", full.tokens[: full.tokens.index(full.tokens[4])])
    short = engine.generate([1, 2, 3], SamplingSettings(max_tokens=2, ignore_eos=True))
    assert (short.finish_reason, short.tokens) == ("length", full.tokens[:2])
    halted = engine.generate([1, 2, 3], SamplingSettings(max_tokens=9, ignore_eos=True), lambda token: False)
    assert (halted.finish_reason, halted.tokens) == ("interrupted", full.tokens[:1])
    with pytest.raises(InputError, match="fill the context of 12"):
        engine.generate([1] * 12, SamplingSettings())


def test_an_exception_in_the_callback_comes_out_and_the_engine_lives_on(tiny_model):
    engine = NativeEngine(tiny_model(seed=2))

    def fail(token: int) -> None:
        raise ZeroDivisionError("from the callback")

    with pytest.raises(ZeroDivisionError, match="from the callback"):
        engine.generate([1, 2], SamplingSettings(max_tokens=5), fail)
    assert len(engine.generate([1, 2], SamplingSettings(max_tokens=5, ignore_eos=True)).tokens) == 5


class AlarmError(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
@pytest.mark.parametrize("long_part", ["prefill", "decode"])
def test_a_signal_interrupts_long_work(tiny_model, long_part):
    model = tiny_model(seed=2, context=4096, layers=40)
    engine = NativeEngine(model, EngineOptions(isa="scalar", threads=1))

    def ring(number, frame) -> None:
        raise AlarmError

    work = {
        "prefill": lambda: engine.logits(np.ones(4096, np.int32), last_only=True),
        "decode": lambda: engine.generate([1], SamplingSettings(max_tokens=4000, ignore_eos=True)),
    }
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    started = time.perf_counter()
    try:
        with pytest.raises(AlarmError):
            work[long_part]()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() - started < 5
    assert engine.logits([1, 2, 3]).shape == (3, model.config.vocab_size)  # nothing was left half done


def test_memory_is_counted_exactly(tiny_model):
    model = tiny_model(seed=1, **ODD)
    config = model.config
    parameters = sum(int(np.prod(shape)) for shape in config.tensor_shapes().values())
    assert NativeEngine(model).memory().weights_bytes == 4 * parameters
    packed = quantized(model, "int4-g32", "int8-g32")
    matrices = sum(pack(packed.stored(n)).nbytes for n, s in config.tensor_shapes().items() if len(s) == 2)
    vectors = sum(4 * s[0] for s in config.tensor_shapes().values() if len(s) == 1)
    assert NativeEngine(packed).memory().weights_bytes == matrices + vectors
    per_position = {"f32": 4 * (8 + 16), "bf16": 2 * (8 + 16), "int8": 8 + 16 + 2 * 4, "int4": 4 + 16 + 2 * 4}
    # V is padded to 16, int4 to 32
    for kv, size in per_position.items():
        memory = NativeEngine(model, EngineOptions(kv_cache=kv)).memory()
        assert memory.kv_bytes == 256 * 2 * len(config.layers) * size  # whole pages of 128
        assert memory.total_bytes == memory.weights_bytes + memory.kv_bytes + memory.scratch_bytes
    short = NativeEngine(model, EngineOptions(max_context=32)).memory()
    assert short.kv_bytes * 8 == NativeEngine(model).memory().kv_bytes


def test_an_isa_that_is_unknown_or_absent_is_refused(tiny_model, monkeypatch):
    monkeypatch.setenv("TRILEMMA_ISA", "scalar")
    assert NativeEngine(tiny_model()).isa == "scalar"
    monkeypatch.setenv("TRILEMMA_ISA", "sse9")
    with pytest.raises(InputError, match=r"'sse9' is unknown\. Usable here: scalar"):
        NativeEngine(tiny_model())


def test_bad_models_are_refused_by_name(tiny_model):
    model = tiny_model()
    wrong = model.with_tensors({"layers.1.ffn.down.weight": np.zeros((3, 4), np.float32)})
    with pytest.raises(CheckpointError, match=r"'layers\.1\.ffn\.down\.weight' has shape \(3, 4\)"):
        NativeEngine(wrong)
    plain_int8 = model.with_tensors({}, {"layers.0.ffn.up.weight": LinearRun(activation="int8-g32")})
    with pytest.raises(CheckpointError, match=r"'layers\.0\.ffn\.up\.weight': int8 activations need quantized"):
        NativeEngine(plain_int8)
    spec = replace_layout(FORMATS.get("int8-g32"))
    other = quantize_rtn(model.tensor("layers.0.ffn.up.weight"), FORMATS.get("int8-g32"))
    stored = replace(pack(other), spec=spec)
    with pytest.raises(UnsupportedModelError, match=r"'kmajor\.v1'"):
        NativeEngine(model.with_tensors({"layers.0.ffn.up.weight": stored}))
    unfinished = _native.Model(model.config.model_dump())
    with pytest.raises(_native.NativeError, match=r"'embedding\.weight' of shape \(97, 48\) is missing"):
        unfinished.finalize()
    with pytest.raises(_native.NativeError, match="not finalized"):
        _native.Context(unfinished, threads=1, isa="", kv_cache="f32", max_context=8)


def replace_layout(spec):
    return spec.model_copy(update={"layout": "kmajor.v1"})


def test_a_closed_engine_says_so(tiny_model):
    engine = NativeEngine(tiny_model())
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.logits([1])


def test_two_threads_do_not_share_an_engine_and_two_engines_do_not_disturb_each_other(tiny_model, random_generator):
    model = tiny_model(seed=9, **ODD)
    tokens = tokens_for(model, random_generator, 150)
    engines = [NativeEngine(model, EngineOptions(threads=2)) for _ in range(3)]
    wanted = engines[0].logits(tokens)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            for found in pool.map(lambda engine: engine.logits(tokens), engines):
                np.testing.assert_array_equal(found, wanted)
    started = threading.Event()
    release = threading.Event()

    def hold(token: int) -> bool:
        started.set()
        release.wait(10)
        return False

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(engines[0].generate, [1, 2], SamplingSettings(max_tokens=2, ignore_eos=True), hold)
        started.wait(10)
        with pytest.raises(InputError, match="already at work"):
            engines[0].logits([1])
        release.set()
        assert len(job.result().tokens) == 1


def _child(engine: NativeEngine, tokens: np.ndarray, queue) -> None:
    queue.put(engine.logits(tokens))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_works_after_fork(tiny_model, random_generator):
    model = tiny_model(seed=9, **ODD)
    tokens = tokens_for(model, random_generator, 100)
    engine = NativeEngine(model, EngineOptions(threads=2))
    wanted = engine.logits(tokens)  # the pool is running now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(engine, tokens, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=30), wanted)
    child.join(30)
    assert child.exitcode == 0


@pytest.mark.shared
def test_stories_tell_the_known_story_in_every_set(shared_dir):
    from trilemma.formats.artifact import load_any
    from trilemma.model.tokenizer import Tokenizer

    path = shared_dir / "models" / "stories260K"
    model, tokenizer = load_any(path), Tokenizer.load(path)
    prompt = tokenizer.encode("Once upon a time")
    settings = SamplingSettings(max_tokens=200, ignore_eos=True)
    wanted = ReferenceEngine(model, EngineOptions(kv_cache="f32")).generate(prompt, settings).tokens
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park"
    assert tokenizer.decode([*prompt, *wanted]).startswith(story)
    for isa in ISAS:
        engine = NativeEngine(model, EngineOptions(isa=isa, kv_cache="f32"))
        assert engine.generate(prompt, settings).tokens == wanted
