"""Predictions from made-up tables equal what counting by hand gives."""

from __future__ import annotations

import pytest

from made_up_host import LARGE, MAC_S, POSITION_S, STREAM_S, host, overhead, tables
from trilemma.core.errors import InputError
from trilemma.core.host_tables import CheckCase
from trilemma.formats.pack import format_bytes
from trilemma.measure.device.small_models import Shape, random_model
from trilemma.measure.device.step_time import Form, StepTimes, attention_seconds, form_of, predict
from trilemma.model.config import Attention, DecoderConfig, Experts, LayerSpec
from trilemma.model.cost import matrix_macs_per_token

SHAPE = Shape(3, 256, hidden=640, heads=4, kv_heads=2, head_dim=64, vocab=4000, context=1024)
NO_ATTENTION = tuple(row.model_copy(update={"seconds": 1e-30}) for row in tables().attention)


def model(name="int8-g32", shape=SHAPE):
    return random_model(shape.config(), name, name, {"f32": "f32", "bf16": "bf16"}.get(name, "int8-g32"))


def test_decode_is_the_sum_of_all_products():
    found = predict(host(attention=NO_ATTENTION), model(), prompt_tokens=10, output_tokens=4)
    assert found.working_set_bytes < 4_000_000  # all in cache
    assert found.tpot_s == pytest.approx(matrix_macs_per_token(SHAPE.config()) * MAC_S, rel=1e-6)


def test_a_large_model_waits_for_memory_byte_by_byte():
    shape = Shape(12, 1024, hidden=2816, heads=16, kv_heads=4, head_dim=64, vocab=32000, context=256)
    found = predict(host(attention=NO_ATTENTION), model("f32", shape), prompt_tokens=10, output_tokens=4)
    shapes = shape.config().tensor_shapes()
    nbytes = sum(format_bytes("f32", shapes[name]) for name in shape.config().product_names())
    assert found.working_set_bytes > LARGE
    assert found.decode.streamed_s == pytest.approx(nbytes * STREAM_S, rel=1e-6)
    assert found.decode.bound == "memory"


@pytest.mark.parametrize("prompt", [1, 40, 128, 300])
def test_prefill_goes_in_chunks_and_the_head_runs_once(prompt):
    found = predict(host(attention=NO_ATTENTION), model(), prompt_tokens=prompt, output_tokens=2)
    head = 4000 * 256
    layer = (matrix_macs_per_token(SHAPE.config()) - head) // 3
    keys = 2 * 2 * 64 * 256  # what the last layer makes of all tokens but one
    assert found.ttft_s == pytest.approx((prompt * (2 * layer + keys) + layer - keys + head) * MAC_S, rel=1e-6)
    assert found.prefill.bound == "compute"


def test_attention_by_depth_and_by_cache():
    base = predict(host(attention=NO_ATTENTION), model(), prompt_tokens=200, output_tokens=20)
    for kv, seconds in POSITION_S.items():
        found = predict(host(), model(), prompt_tokens=200, output_tokens=20, kv=kv)
        # 2 KV heads on 2 threads, each with a group of 2, at depth 210, in 3 layers
        assert found.decode.attention_s == pytest.approx(3 * 210 * 2 * seconds, rel=1e-6)
        assert found.tpot_s > base.tpot_s


def test_attention_of_a_prompt_counts_pairs_and_windows():
    spec = SHAPE.config().layers[0].attention
    timed = tables().attention
    pairs = sum(200 + i + 1 for i in range(50))
    assert attention_seconds(timed, spec, "bf16", 50, 200, 2) == pytest.approx(pairs * 4 * 1e-9 / 2, rel=1e-6)
    narrow = spec.model_copy(update={"window": 16})
    assert attention_seconds(timed, narrow, "bf16", 50, 200, 2) == pytest.approx(50 * 16 * 4 * 1e-9 / 2, rel=1e-6)
    assert attention_seconds(timed, narrow, "bf16", 1, 900, 2) == attention_seconds(timed, narrow, "bf16", 1, 16, 2)


def test_overhead_by_what_a_step_has():
    costs = {"step_s": 1e-3, "vocab_s": 1e-7, "block_s": 1e-5, "dim_s": 1e-8, "hidden_s": 2e-8, "heads_s": 3e-8}
    found = predict(
        host(attention=NO_ATTENTION, overheads=(overhead(1, **costs), overhead(128, **costs))),
        model(), prompt_tokens=10, output_tokens=2,
    )  # fmt: skip
    layer = 2 * (1e-5 + 256e-8) + 640 * 2e-8 + (4 + 2 * 2) * 64 * 3e-8
    assert found.decode.overhead_s == pytest.approx(1e-3 + 4000e-7 + 3 * layer, rel=1e-9)
    assert found.decode.bound == "overhead"


def test_only_the_experts_that_a_token_chooses_count():
    experts = Experts(count=8, active=2, hidden=384, shared_hidden=128)
    attention = Attention(heads=4, kv_heads=4, head_dim=64, rope=None, scale=0.125)
    config = DecoderConfig(
        family="llama", dim=256, vocab_size=512, max_context=512, norm_eps=1e-5, tied=True,
        layers=(LayerSpec(attention=attention, ffn=experts),) * 2,
    )  # fmt: skip
    form = Form(config, lambda name: "int8-g32", lambda name: "int8-g32", "bf16")
    found = StepTimes(host(attention=NO_ATTENTION)).predict(form, 8, 2)
    assert found.tpot_s == pytest.approx(matrix_macs_per_token(config) * MAC_S, rel=1e-6)


def test_the_error_of_held_out_models_comes_with_the_prediction():
    checks = tuple(
        CheckCase(name=str(i), quantity="tpot_s", predicted_s=1.0 + error, measured_s=1.0)
        for i, error in enumerate((0.01, 0.03, -0.02, 0.10, 0.05))
    )
    found = predict(host(checks=checks), model(), prompt_tokens=10, output_tokens=2)
    assert found.tpot_error is not None
    assert found.tpot_error[0] == pytest.approx(0.03)
    assert 0.05 < found.tpot_error[1] <= 0.10
    assert found.ttft_error is None


def test_what_can_not_be_predicted_says_why():
    from trilemma.core.device import load_device

    with pytest.raises(InputError, match="trilemma profile"):
        predict(load_device("laptop"), model(), prompt_tokens=10, output_tokens=2)
    with pytest.raises(InputError, match="taken with 2 threads, not 7"):
        predict(host(), model(), prompt_tokens=10, output_tokens=2, threads=7)
    with pytest.raises(InputError, match="none"):
        predict(host(), model(), prompt_tokens=10, output_tokens=2, kv="none")


def test_a_forecast_takes_the_kernel_times():
    from trilemma.search.forecast import forecast_schemes

    found = forecast_schemes(model("bf16"), host(), schemes=("as it is", "W4A8-g128"), context=128)
    direct = StepTimes(host()).predict(form_of(model("bf16")), 64, 64)
    assert found["as it is"].measurements["tpot_s"].value == pytest.approx(direct.tpot_s)
    assert "made-up" in found["as it is"].measurements["tpot_s"].method
    assert "int4-g32 x int8-g32 stands for int4-g128 x int8-g32" in found["W4A8-g128"].measurements["tpot_s"].method


def test_a_long_cache_comes_from_memory_too():
    shape = Shape(12, 1024, hidden=2816, heads=16, kv_heads=4, head_dim=64, vocab=32000, context=2048)
    found = predict(host(attention=NO_ATTENTION), model("f32", shape), prompt_tokens=1000, output_tokens=2)
    assert found.decode.attention_s == pytest.approx(1001 * 12 * 2 * 4 * 64 * 2 * STREAM_S, rel=1e-6)
