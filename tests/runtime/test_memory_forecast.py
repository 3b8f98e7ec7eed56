"""What the engine counts once it is open was known before: to the byte, for every family, policy and format."""

from __future__ import annotations

import pytest

from family_cases import BASE, CASES
from trilemma.core.errors import InputError, UnsupportedModelError
from trilemma.formats.artifact import load_any
from trilemma.model.config import with_low_rank
from trilemma.runtime.engine import EngineOptions
from trilemma.runtime.memory_forecast import forecast_engine, forecast_engine_of
from trilemma.runtime.native import NativeEngine
from trilemma.techniques.cost_twin import cost_twin
from trilemma.techniques.schemes import scheme_to_recipe

POLICIES = ("none", "f32", "bf16", "int8", "int4")


def counted(model, context, kv, sequences=1):
    engine = NativeEngine(model, EngineOptions(kv_cache=kv, max_context=context, threads=1))
    try:
        return engine.open_sequences(sequences).memory()
    finally:
        engine.close()


def check(model, context, kv, sequences=1):
    found = forecast_engine(model, context=context, kv=kv, sequences=sequences)
    real = counted(model, context, kv, sequences)
    assert (found.weights_bytes, found.kv_bytes, found.scratch_bytes) == (
        real.weights_bytes, real.kv_bytes, real.scratch_bytes,
    )  # fmt: skip
    assert found.total_bytes == real.total_bytes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_every_family_as_it_is_and_packed(case, save_hf):
    kind, options = CASES[case]
    model = load_any(save_hf(kind, **options)[1])
    for index, scheme in enumerate((None, "W8A8-g32", "W4A8-g32", "f32")):
        twin = model if scheme is None else cost_twin(model, scheme_to_recipe(scheme))
        check(twin, 33 + index, POLICIES[index])


@pytest.mark.parametrize("kv", POLICIES)
@pytest.mark.parametrize(("context", "sequences"), [(1, 1), (17, 3), (64, 1), (64, 5)])
def test_contexts_policies_and_sequences(tiny_model, kv, context, sequences):
    check(tiny_model(), context, kv, sequences)


@pytest.mark.parametrize("options", [{}, {"router": "glu", "shared_hidden": 20, "down_bias": True}, {"active": 5}])
@pytest.mark.parametrize("context", [1, 3, 64])
def test_experts(random_model, experts_config, options, context):
    check(random_model(experts_config(**options)), context, "bf16")
    check(random_model(with_low_rank(experts_config(**options), 9)), context, "bf16")


@pytest.mark.parametrize("scheme", [
    "bf16", "W8A16", "W4A8-g64-asym-gptq", "W4A16-g32-gptq", "W4A8-g32-gptq-kv8", "W6A8-g32", "W3A8-g16", "W3A8-g64",
    "W2A8-g16-asym", "W2A16-g32-asym", "W4A8-g64-asym+eora7", "W4A16-g32+eora24",
])  # fmt: skip
def test_inputs_in_every_form(tiny_model, scheme):
    twin = cost_twin(tiny_model(), scheme_to_recipe(scheme))
    check(twin, 48, twin.run.kv_cache)


def test_a_real_checkpoint(hearth_path):
    check(load_any(hearth_path), 300, "bf16", 2)


def test_by_hand(tiny_model):
    """2 layers, 2 key-value heads of 16, 40 positions padded to 48: keys and values in bf16."""
    found = forecast_engine(tiny_model(), context=40, kv="bf16")
    assert found.kv_bytes == 2 * 2 * 2 * 16 * 48 * 2
    without = forecast_engine(tiny_model(), context=40, kv="none")
    assert without.kv_bytes == 2 * 2 * 16 * 48 * 4 + 40 * 4  # one layer in f32, and the tokens


def test_what_can_not_be_opened_is_refused(tiny_model):
    with pytest.raises(InputError, match="context of 65 is not possible"):
        forecast_engine(tiny_model(), context=65)
    wide = tiny_model().config
    layers = tuple(
        layer.model_copy(update={"attention": layer.attention.model_copy(update={"head_dim": 1024})})
        for layer in wide.layers
    )
    wide = wide.model_copy(update={"layers": layers})
    with pytest.raises(UnsupportedModelError, match="head_dim=1024"):
        forecast_engine_of(wide, lambda name: "f32", lambda name: "f32", context=8, kv="bf16")


def test_a_long_context_costs_nothing_to_ask(tiny_model):
    huge = tiny_model(context=100_000_000)
    found = forecast_engine(huge, context=100_000_000, kv="f32", sequences=8)
    assert found.kv_bytes == 8 * 2 * 2 * 2 * 16 * 100_000_000 * 4


@pytest.mark.filterwarnings("ignore")
def test_parts_of_fused_tensors_are_read_with_the_whole(save_hf):
    source = load_any(save_hf("Phi3", **BASE)[1]).source
    fused = (40 + 2 * 20) * 40 * 4  # queries, keys and values of Phi-3 lie in one tensor
    assert source.reading_bytes("layers.0.attention.k.weight") == fused + 20 * 40 * 4
    assert source.reading_bytes("layers.0.attention.o.weight") == 40 * 40 * 4
