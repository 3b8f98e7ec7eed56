"""Probes run the engine on real shapes and say what they ran; tables follow from raw seconds by arithmetic."""

from __future__ import annotations

import itertools

import pytest

from trilemma import _native
from trilemma.core.errors import InputError
from trilemma.measure.device.engine_probe import (
    CHUNK,
    DEEP,
    SHALLOW,
    AttentionKey,
    StepKey,
    attention_probes,
    attention_times,
    overheads,
    step_probes,
)
from trilemma.measure.device.host_profile import tables_of, with_checks, working_sets
from trilemma.measure.device.product_probe import Pool, ProductKey, product_probes, undisturbed
from trilemma.measure.device.small_models import Shape, open_shape, random_model
from trilemma.measure.device.tries import take_turns, typical
from trilemma.runtime.native import load_weights


@pytest.fixture(scope="module")
def weights():
    return load_weights(random_model(Shape(2, 64, hidden=96, heads=2, kv_heads=1).config(), "f32", "f32", "f32"))


def test_products_are_walked_as_often_as_asked(weights):
    jobs = [["layers.0.ffn.gate.weight", "layers.0.ffn.up.weight"], ["layers.1.ffn.down.weight"]]
    found = _native.time_products(weights, jobs, tokens=3, threads=2, passes=5)
    assert len(found) == 5
    assert min(found) > 0


@pytest.mark.parametrize(
    ("jobs", "says"),
    [
        ([["layers.0.ffn.nothing.weight"]], "no matrix named"),
        ([["layers.0.ffn.up.weight", "layers.0.ffn.down.weight"]], "takes 96 inputs, the others of its job 64"),
        ([[]], "no matrix"),
    ],
)
def test_jobs_that_can_not_be_run(weights, jobs, says):
    with pytest.raises(_native.NativeError, match=says):
        _native.time_products(weights, jobs, tokens=1, threads=1)


def test_a_pool_times_what_its_key_says():
    pool = Pool("int4-g32", "int8-g32", 96, 64, 40_000)
    key, once = pool.cached(4, 1, 10_000)
    assert (key.rows, key.cols, key.tokens, key.threads, key.format) == (96, 64, 4, 1, "int4-g32")
    assert key.working_set_bytes % pool.one == 0
    assert 0 < once() < 0.1
    key, once = pool.streamed(1, 1)
    assert key.working_set_bytes == pool.count * pool.one
    assert [once() > 0 for _ in range(5)] == [True] * 5  # comes round again after the last matrix


def test_cells_are_distinct_and_span_the_working_sets():
    sets = (65_536, 131_072, 262_144)
    keys = [key for key, _ in itertools.islice(product_probes((1,), sets, quick=True), 12)]
    assert len(set(keys)) == len(keys)


def test_attention_and_steps_run():
    for key, once in itertools.islice(attention_probes((1,)), 2):
        assert key.depth in (SHALLOW, DEEP)
        assert once() > 0
    found = {key: once() for key, once in itertools.islice(step_probes((1,)), 6)}
    assert {key.part for key in found} == {"step", "products"}
    assert min(found.values()) > 0


def test_attention_is_the_difference_between_the_depths():
    def key(tokens, depth):
        return AttentionKey("bf16", 2, tokens, 4, 64, depth)

    timed = {key(1, SHALLOW): 1e-5, key(1, DEEP): 1e-5 + 2 * DEEP * 7e-9,
             key(CHUNK, SHALLOW): 1e-3, key(CHUNK, DEEP): 1e-3 + 2 * DEEP * CHUNK * 8 * 5e-9 / 2}  # fmt: skip
    found = {row.tokens: row.seconds for row in attention_times(timed)}
    assert found[1] == pytest.approx(7e-9)  # two layers, two KV heads on two threads
    assert found[CHUNK] == pytest.approx(5e-9)  # of 8 query heads and 128 tokens, on two threads


def test_overheads_are_found_again():
    shapes = [
        Shape(2, 64, hidden=64), Shape(8, 64, hidden=64), Shape(8, 768, hidden=64), Shape(4, 64, hidden=2048),
        Shape(2, 64, hidden=64, vocab=16384), Shape(8, 64, heads=2, kv_heads=2), Shape(8, 64, heads=16, kv_heads=8),
    ]  # fmt: skip
    seconds = {}
    for shape in shapes:
        blocks = shape.layers
        heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        rest = 1e-6 + 1e-9 * shape.vocab + blocks * (2e-7 + 1e-10 * shape.dim) + shape.layers * (
            3e-10 * shape.hidden + 4e-10 * heads)  # fmt: skip
        seconds[StepKey(shape, 1, 1, "products")] = 5e-6
        seconds[StepKey(shape, 1, 1, "step")] = 5e-6 + 1e-6 + rest
    (found,) = overheads(seconds, {(shape, 1, 1): 1e-6 for shape in shapes})
    assert found.vocab_s == pytest.approx(1e-9, rel=1e-3)
    assert found.dim_s == pytest.approx(1e-10, rel=1e-3)
    assert found.hidden_s == pytest.approx(3e-10, rel=1e-3)
    assert found.heads_s == pytest.approx(4e-10, rel=1e-3)
    assert found.block_s == pytest.approx(2e-7, rel=1e-3)


def test_turns_are_fair_and_the_first_does_not_count():
    seen = []

    def one(name):
        return lambda: seen.append(name) or float(len(seen))

    found = take_turns({name: one(name) for name in "abc"}, rounds=4, most_s=60)
    assert [len(times) for times in found.values()] == [4, 4, 4]
    assert len(seen) == 15
    assert all(sorted(seen[at : at + 3]) == ["a", "b", "c"] for at in range(0, 15, 3))
    assert len({seen[at] for at in range(0, 15, 3)}) > 1


def test_time_that_is_up_still_leaves_three_rounds():
    found = take_turns({"a": lambda: 1.0}, rounds=50, most_s=0.0)
    assert len(found["a"]) == 3


def test_a_noisy_machine_is_judged_by_its_quick_tries():
    samples = [1.0, 1.01, 1.02, 1.03, 5.0, 9.0, 9.0, 9.0]
    assert typical(samples) == pytest.approx(1.0175)
    assert typical(samples, noisy=True) == pytest.approx(1.0, abs=0.01)


def test_working_sets_go_from_the_caches_to_far_beyond():
    sets = working_sets({2: 1 << 20, 3: 32 << 20})
    assert sets == tuple(sorted(sets))
    assert sets[0] == 4 << 20
    assert sets[-1] == 128 << 20
    small = working_sets({2: 512 << 10, 3: 2 << 20})  # a board
    assert small[-1] >= 32 << 20
    assert small == tuple(sorted(set(small)))


def test_tables_and_factors_come_from_samples():
    tries = dict(itertools.islice(product_probes((1,), (65_536, 262_144), quick=True), 4))
    tries |= dict(itertools.islice(attention_probes((1,)), 4))
    tries |= dict(itertools.islice(step_probes((1,)), 6))
    tables = tables_of(take_turns(tries, rounds=3, most_s=1), 1, None)
    assert len(tables.products) == 4
    assert tables.threads == (1,)
    assert tables_of(take_turns(tries, rounds=3, most_s=1), 1, "a neighbour").noisy == "a neighbour"


def test_factors_follow_the_check_cases():
    from made_up_host import host
    from trilemma.core.host_tables import CheckCase

    checks = [CheckCase(name="a", quantity=q, predicted_s=1.1, measured_s=1.0) for q in ("tpot_s", "ttft_s")]
    device = with_checks(host(), checks)
    assert device.decode_factor.value == pytest.approx(1.1)
    assert device.decode_factor.basis == "measured"
    assert device.host is not None
    assert device.host.errors("ttft_s") == pytest.approx([0.1])


def test_a_shape_opens_in_the_engine():
    engine = open_shape(Shape(1, 32, hidden=64, heads=1, kv_heads=1, head_dim=32), 1)
    assert engine.logits([1, 2]).shape == (2, 64)
    with pytest.raises(InputError):
        engine.logits([64])
    engine.close()


def test_a_cell_whose_tries_were_all_disturbed_is_put_right():
    def key(tokens, working_set=4_000_000):
        return ProductKey("f32", "f32", 1, tokens, 384, 384, working_set)

    quiet = {
        key(1): 1e-6,
        key(2): 1.9e-6,
        key(8): 6e-6,
        key(32): 24e-6,
        key(1, 64_000_000): 3e-6,
        key(8, 64_000_000): 9e-6,
    }
    assert undisturbed(quiet) == quiet
    late, early = quiet | {key(8): 90e-6}, quiet | {key(1): 40e-6}
    assert undisturbed(late)[key(8)] == pytest.approx(1.1 * 1.9e-6 * 4)
    assert undisturbed(early)[key(1)] == pytest.approx(1.9e-6)
    assert undisturbed(late)[key(8, 64_000_000)] == 9e-6
