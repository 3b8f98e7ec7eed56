"""Every architecture option of the schema in the native engine: near the torch engine, and the same bits everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from trilemma import _native
from trilemma.formats import FORMATS
from trilemma.formats.quantize import quantize_rtn
from trilemma.model.config import Attention, DecoderConfig, Dense, Experts, LayerSpec, Rope
from trilemma.model.model import LinearRun, Model
from trilemma.model.plain import PlainMatrix, f32_to_bf16
from trilemma.model.sources import MemorySource
from trilemma.runtime import EngineOptions
from trilemma.runtime.native import NativeEngine, Step, load_weights, supported_isas
from trilemma.runtime.reference import ReferenceEngine

ISAS = supported_isas()
DIM, HEAD_DIM, HIDDEN, VOCAB, CONTEXT = 40, 20, 52, 83, 96


@pytest.fixture(autouse=True)
def one_torch_thread():
    torch.set_num_threads(1)


def rope(pairs: int = 10, theta: float = 1e4) -> Rope:
    return Rope(theta=theta, inverse_frequencies=tuple(theta ** (-i / pairs) for i in range(pairs)))


def attention(heads: int = 4, kv_heads: int = 2, **settings: Any) -> Attention:
    fields = {"heads": heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM, "rope": rope(), "scale": 0.2}
    return Attention(**(fields | settings))


def experts(**settings: Any) -> Experts:
    return Experts(**({"count": 5, "active": 2, "hidden": 36} | settings))


def layer(mixer: Attention | None = None, ffn: Dense | Experts | None = None, **settings: Any) -> LayerSpec:
    return LayerSpec(attention=mixer or attention(), ffn=ffn or Dense(hidden=HIDDEN), **settings)


@dataclass
class Case:
    layers: tuple[LayerSpec, ...]
    config: dict[str, Any] = field(default_factory=dict)


CASES = {
    "layer norm": Case((layer(),), {"norm": "layer"}),
    "layer norm with bias": Case((layer(),), {"norm": "layer", "norm_bias": True}),
    "rms norm with bias": Case((layer(),), {"norm_bias": True}),
    "q and k norms": Case((layer(attention(qk_norm=True)), layer(attention(qk_norm=True, rope=None, qkv_bias=True)))),
    "scaled embedding": Case((layer(),), {"embedding_scale": 6.3}),
    "learned positions": Case((layer(attention(rope=None)),), {"learned_positions": True}),
    "learned positions, scaled": Case((layer(),), {"learned_positions": True, "embedding_scale": 0.5}),
    "parallel": Case((layer(parallel=True), layer(parallel=True))),
    "parallel, one part": Case(
        (LayerSpec(attention=attention(), ffn=None, parallel=True), layer(parallel=True),
         LayerSpec(attention=None, ffn=Dense(hidden=7), parallel=True)),
    ),
    "post norms": Case((layer(post_norms=True), layer())),
    "post norms, one part": Case(
        (LayerSpec(attention=attention(), ffn=None, post_norms=True),
         LayerSpec(attention=None, ffn=Dense(hidden=HIDDEN), post_norms=True)),
        {"norm_bias": True},
    ),
    "post norms, parallel": Case((layer(parallel=True, post_norms=True), layer()), {"norm": "layer"}),
    "down bias": Case((layer(ffn=Dense(hidden=HIDDEN, down_bias=True)),)),
    "plain": Case((layer(ffn=Dense(hidden=HIDDEN, gated=False, bias=True, activation="gelu")),)),
    "partial rotation": Case((layer(attention(rope=rope(3))), layer(attention(rope=rope(7, 500.0), window=11)))),
    "widths that differ": Case(
        (layer(attention(6, 3), Dense(hidden=9)), layer(attention(1, 1), Dense(hidden=130)),
         layer(attention(5, 1, head_dim=12, rope=rope(6)), Dense(hidden=1))),
    ),
    "neither part": Case((LayerSpec(attention=None, ffn=None), layer())),
    "experts": Case((layer(ffn=experts()), layer())),
    "experts, shared": Case((layer(ffn=experts(shared_hidden=17, down_bias=True)),)),
    "experts, softmax gates": Case((layer(ffn=experts(gates="softmax", active=3, activation="gelu")),)),
    "experts, representative neurons": Case(
        (layer(ffn=experts(router="glu", gates="one", shared_hidden=61)), layer(ffn=experts(router="glu"))),
    ),
    "experts, all": Case((layer(ffn=experts(active=5, gates="one")),)),
    "experts, one of one": Case((layer(ffn=experts(count=1, active=1, hidden=3)),)),
    "experts, parallel, post norms": Case(
        (layer(ffn=experts(shared_hidden=20, down_bias=True), parallel=True, post_norms=True),
         layer(ffn=experts(gates="one"), post_norms=True)),
        {"norm": "layer", "norm_bias": True},
    ),
    "everything": Case(
        (layer(attention(6, 2, qk_norm=True, rope=rope(4), qkv_bias=True, o_bias=True, window=9),
               experts(count=7, active=4, hidden=33, shared_hidden=12, down_bias=True), post_norms=True),
         layer(attention(3, 3, rope=None), Dense(hidden=77, gated=False, bias=True, activation="relu"), parallel=True)),
        {"norm_bias": True, "embedding_scale": 3.0, "learned_positions": True, "tied": False},
    ),
}  # fmt: skip


def random_model(case: Case, rng: np.random.Generator) -> Model:
    sizes = {"family": "llama", "dim": DIM, "vocab_size": VOCAB, "max_context": CONTEXT, "norm_eps": 1e-5, "tied": True}
    config = DecoderConfig(**(sizes | {"layers": case.layers} | case.config))
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        values = rng.standard_normal(shape).astype(np.float32)
        norm = name.endswith("norm.weight")
        tensors[name] = 1 + 0.1 * values if norm else values / np.sqrt(np.float32(shape[-1]))
    return Model(config, MemorySource(tensors))


def stored_as(model: Model, format_name: str, activation: str, keep: str = ".router.") -> Model:
    """Every matrix of the layers but `keep` in one format; the router in bf16."""
    spec = FORMATS.get(format_name)
    tensors: dict[str, Any] = {}
    for name in model.config.linear_names():
        values = model.tensor(name)
        if keep in name or format_name == "bf16":
            tensors[name] = PlainMatrix("bf16", f32_to_bf16(values))
        elif format_name != "f32":
            tensors[name] = quantize_rtn(values, spec)
    runs = {name: LinearRun(activation=activation) for name in model.config.linear_names() if keep not in name}
    return model.with_tensors(tensors, runs)


def tokens_for(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, VOCAB, count).astype(np.int32)


def assert_near_reference(model: Model, tokens: np.ndarray, kv: str, tolerance: float) -> np.ndarray:
    wanted = ReferenceEngine(model, EngineOptions(kv_cache=kv)).logits(tokens)
    found = NativeEngine(model, EngineOptions(kv_cache=kv, threads=1)).logits(tokens)
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
    return found


def assert_one_answer(model: Model, tokens: np.ndarray, whole: np.ndarray, kv: str) -> None:
    """The bits of `whole` in every set, with two threads, in chunks, in calls, and as one of a batch."""
    weights = load_weights(model)

    def context(**settings: Any) -> _native.Context:
        defaults = {"threads": 1, "isa": "", "kv_cache": kv, "max_context": CONTEXT}
        return _native.Context(weights, **(defaults | settings))

    # The processor's own bf16 products, of weights or a cache, round in their own way: other sets are near it, no more.
    rounded = kv == "bf16" or any(model.linear(name).activation == "bf16" for name in model.config.linear_names())
    isas = ISAS[-1:] if rounded and ISAS[-1] in ("avx512bf16", "amx") else ISAS
    contexts = [context(isa=isa, threads=threads) for isa in isas for threads in (1, 2)]
    contexts += [context(chunk=chunk, threads=2) for chunk in (1, 3, 20)]
    for each in contexts:
        np.testing.assert_array_equal(each.forward([(each.create(), tokens, "all")]), whole)
    steps = context()
    sequence = steps.create()
    parts = [steps.forward([(sequence, part, "all")]) for part in np.split(tokens, [1, 2, 23, len(tokens) - 1])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    batch = context(max_sequences=5, threads=2)
    ids = [batch.create() for _ in range(5)]
    batch.forward([(i, tokens[: 4 + i], "none") for i in ids])
    for size in range(1, 6):  # each sequence decodes one token in a batch of `size`
        at = [batch.length(i) for i in ids[:size]]
        found = batch.forward([(i, tokens[n : n + 1], "last") for i, n in zip(ids[:size], at, strict=True)])
        np.testing.assert_array_equal(found, whole[at])


@pytest.mark.parametrize("name", CASES)
def test_options_in_f32(random_generator, name):
    model = random_model(CASES[name], random_generator)
    tokens = tokens_for(random_generator, 60)
    found = assert_near_reference(model, tokens, "f32", 2e-5)
    assert_one_answer(model, tokens, found, "f32")
    uncached = NativeEngine(model, EngineOptions(kv_cache="none")).logits(tokens)
    np.testing.assert_array_equal(uncached, found)


@pytest.mark.parametrize("kv", ["none", "bf16", "int8", "int4"])
def test_everything_at_once_in_every_cache(random_generator, kv):
    model = random_model(CASES["everything"], random_generator)
    tokens = tokens_for(random_generator, 60)
    found = NativeEngine(model, EngineOptions(kv_cache=kv)).logits(tokens)
    assert_one_answer(model, tokens, found, kv)


@pytest.mark.parametrize(
    ("format_name", "activation"),
    [("bf16", "f32"), ("bf16", "bf16"), ("int8-channel", "int8-g32"), ("int8-g32", "f32"), ("int4-g32", "int8-g32"),
     ("int4-g32-asym", "int8-g32"), ("int4-g64-asym", "bf16"), ("int4-g128", "f32")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["experts, shared", "experts, softmax gates", "everything"])
def test_experts_in_every_kind_of_format(random_generator, name, format_name, activation):
    model = stored_as(random_model(CASES[name], random_generator), format_name, activation)
    errors = []
    for _ in range(3):
        tokens = tokens_for(random_generator, 60)
        found = NativeEngine(model, EngineOptions(kv_cache="f32")).logits(tokens)
        wanted = ReferenceEngine(model, EngineOptions(kv_cache="f32")).logits(tokens)
        errors.append(np.abs(found - wanted).max(1) / np.abs(wanted).max())
    assert_one_answer(model, tokens, found, "f32")
    if activation == "f32":
        # Scores of a router that are equal but for rounding let another expert in, at once and by far, in one text of
        # three at most; a difference that grows from small ones is a fault in any.
        swapped = [error for error in errors if error.max() > 2e-5]
        assert len(swapped) <= 1
        assert all(error[error > 2e-5][0] > 1e-3 for error in swapped)
    else:
        # Rounded activations may fall to either side of an edge, and then a close router chooses another expert.
        assert np.median(errors) <= 2e-2


def test_formats_may_differ_between_experts(random_generator):
    model = random_model(CASES["experts, shared"], random_generator)
    tensors: dict[str, Any] = {}
    runs = {}
    formats = [("int8-channel", "int8-g32"), ("int4-g32-asym", "f32"), ("int4-g32", "bf16"), ("int8-g32", "int8-g32")]
    for expert, (format_name, activation) in enumerate(formats):  # the fifth stays f32
        for role in ("gate", "up", "down"):
            name = f"layers.0.ffn.experts.{expert}.{role}.weight"
            tensors[name] = quantize_rtn(model.tensor(name), FORMATS.get(format_name))
            runs[name] = LinearRun(activation=activation)
    mixed = model.with_tensors(tensors, runs)
    tokens = tokens_for(random_generator, 60)
    found = assert_near_reference(mixed, tokens, "f32", 2e-2)
    assert_one_answer(mixed, tokens, found, "f32")


def test_equal_scores_go_to_the_lower_index(random_generator):
    """Twin experts with twin scores: giving the later twins other weights changes nothing."""
    case = Case((layer(ffn=experts(count=6, active=2, gates="one")),))
    model = random_model(case, random_generator)
    router = np.zeros((6, DIM), np.float32)
    twins = model.with_tensors({"layers.0.ffn.router.weight": router})
    assert_near_reference(twins, tokens_for(random_generator, 30), "f32", 2e-5)
    names = [name for name in model.config.linear_names() if any(f"experts.{e}." in name for e in range(2, 6))]
    other = twins.with_tensors({name: -2 * model.tensor(name) for name in names})
    tokens = tokens_for(random_generator, 30)
    np.testing.assert_array_equal(NativeEngine(other).logits(tokens), NativeEngine(twins).logits(tokens))


def test_all_experts_active_are_the_dense_block_cut_in_pieces(random_generator):
    hidden, count = 45, 5
    dense = random_model(Case((layer(ffn=Dense(hidden=hidden)),)), random_generator)
    part = hidden // count
    spec = Experts(count=count, active=count, hidden=part, gates="one")
    config = dense.config.model_copy(update={"layers": (layer(ffn=spec),)})
    tensors = {name: dense.tensor(name) for name in dense.config.tensor_shapes() if ".ffn." not in name}
    tensors["layers.0.ffn.router.weight"] = random_generator.standard_normal((count, DIM)).astype(np.float32)
    for e in range(count):
        rows = slice(e * part, (e + 1) * part)
        for role in ("gate", "up"):
            tensors[f"layers.0.ffn.experts.{e}.{role}.weight"] = dense.tensor(f"layers.0.ffn.{role}.weight")[rows]
        tensors[f"layers.0.ffn.experts.{e}.down.weight"] = dense.tensor("layers.0.ffn.down.weight")[:, rows]
    tokens = tokens_for(random_generator, 50)
    wanted = NativeEngine(dense).logits(tokens)
    found = NativeEngine(Model(config, MemorySource(tensors))).logits(tokens)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_scratch_of_experts_is_counted(random_generator):
    def scratch(spec: Experts) -> int:
        return NativeEngine(random_model(Case((layer(ffn=spec),)), random_generator)).memory().scratch_bytes

    few, many = scratch(experts(count=5, hidden=8)), scratch(experts(count=40, hidden=8))
    assert few + 35 * CONTEXT * 4 <= many <= few + 60 * CONTEXT * 4  # scores; the rest does not grow with the count


def test_generation_and_batches_agree(random_generator):
    model = random_model(CASES["everything"], random_generator)
    engine = NativeEngine(model, EngineOptions(kv_cache="bf16"))
    batch = engine.open_sequences(3)
    texts = [tokens_for(random_generator, count) for count in (5, 31, 12)]
    found = batch.forward([Step(batch.create(), text, "all") for text in texts])
    for text, logits in zip(texts, found, strict=True):
        np.testing.assert_array_equal(logits, engine.logits(text))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"active": 6}, r"layer 0: active=6 must be in 1\.\.5"), ({"count": 0, "active": 1}, "layer 0: experts need"),
     ({"shared_hidden": -1}, "shared_hidden"), ({"router": "hash"}, "Unknown router 'hash'. Valid: linear, glu")],
)  # fmt: skip
def test_impossible_experts_are_refused(random_generator, change, message):
    record = random_model(CASES["experts"], random_generator).config.model_dump()
    record["layers"][0]["ffn"] |= change
    with pytest.raises(_native.NativeError, match=message):
        _native.Model(record)
