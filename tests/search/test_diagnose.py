"""The diagnosis recovers causes that were put into made-up timings, and its parts are right on real ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trilemma.core.errors import InputError
from trilemma.formats.artifact import weights_bytes
from trilemma.measure.device.compute_ceiling import compute_rate
from trilemma.measure.timing.interleave import Rounds, interleave
from trilemma.runtime.draft_length import expected_tokens
from trilemma.search.diagnosis.deployed import (
    Deployed,
    hollow,
    narrower,
    nearest_format,
    open_deployed,
    restructured,
    shallower,
)
from trilemma.search.diagnosis.diagnose import BATCH, diagnose, judge_phase
from trilemma.search.diagnosis.remedies import break_even

LEAST = {"memory": 1e-4, "compute": 1e-4}


def made_up(memory, compute, overhead, generator, noise=0.02, rounds=15):
    """Timings of a machine on which bytes, arithmetic and overhead take these seconds, one after another."""

    def timed(seconds):
        return list(seconds * np.exp(noise * generator.standard_normal(rounds)))

    whole = memory + compute + overhead
    return Rounds({
        "base": {"prefill": timed(whole), "decode": timed(whole)},
        "half prompt": {"prefill": timed(memory + compute / 2 + overhead)},
        "hollow": {"prefill": timed(overhead), "decode": timed(overhead)},
        "batch 1": {"decode": timed(whole + 1e-4)},
        f"batch {BATCH}": {"decode": timed(memory + BATCH * compute + overhead + 1e-4)},
    })  # fmt: skip


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("cause", "parts"),
    [("memory", (0.8, 0.15, 0.05)), ("compute", (0.1, 0.85, 0.05)), ("overhead", (0.05, 0.05, 0.9))],
)
def test_the_cause_that_was_put_in_is_found(phase, cause, parts, random_generator):
    found = judge_phase(phase, made_up(*parts, random_generator), LEAST)
    assert found.bound == cause
    assert found.clear
    for name, value in zip(("memory", "compute", "overhead"), parts, strict=True):
        assert found.shares[name].value == pytest.approx(value, abs=0.07)
    assert sum(share.value for share in found.shares.values()) == pytest.approx(1)
    assert cause in found.sentence


def test_two_causes_of_one_size_are_not_told_apart(random_generator):
    all_found = [
        judge_phase("decode", made_up(0.5, 0.48, 0.02, random_generator, noise=0.1, rounds=7), LEAST)
        for _ in range(100)
    ]
    unclear = [found for found in all_found if not found.clear]
    assert len(unclear) >= 85  # an interval of 95%: about four of a hundred are clear by chance
    assert all("not clearly" in found.sentence for found in unclear)


def test_interleaving_takes_turns_and_discards_the_first_round():
    calls = []

    def case(name):
        def run():
            calls.append(name)
            return {"decode": float(len(calls))}

        return run

    found = interleave({"a": case("a"), "b": case("b"), "c": case("c")}, threads=1, rounds=4)
    assert calls[:6] == ["a", "b", "c", "a", "b", "c"]
    assert calls[6:9] == ["b", "c", "a"]
    assert {name: len(kept["decode"]) for name, kept in found.samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_expected_tokens_of_speculation_by_counting(random_generator):
    accepted, drafted = 0.6, 3
    hits = random_generator.random((200_000, drafted)) < accepted
    counted = (np.cumprod(hits, axis=1).sum(axis=1) + 1).mean()
    assert expected_tokens(accepted, drafted) == pytest.approx(counted, rel=0.01)
    assert expected_tokens(1.0, drafted) == drafted + 1
    assert expected_tokens(break_even(1.8, drafted), drafted) == pytest.approx(1.8)
    assert break_even(4.0, drafted) is None


def test_twins_have_the_structure_that_they_stand_for(tiny_model):
    model = tiny_model(seed=1, layers=4, ffn=160)
    config = model.config
    assert [layer.ffn.hidden for layer in narrower(config, 0.75).layers] == [128] * 4
    assert len(shallower(config, 0.5).layers) == 2
    empty = hollow(config)
    assert len(empty.layers) == 4
    assert weights_bytes(restructured(model, empty)) < 0.2 * weights_bytes(model)
    twin = restructured(model, shallower(config, 0.5))
    assert {twin.format_of(name) for name in twin.config.linear_names()} == {"f32"}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("Q8_0", "int8-g32"), ("Q4_K", "int4-g32-k"), ("Q6_K", "int6-g16-k"), ("Q5_K", "int5-g32-k"),
     ("Q5_1", "int5-g32-asym"), ("IQ2_XS", "int2-g16-k"), ("IQ4_XS", "int4-g128"), ("BF16", "bf16")],
)  # fmt: skip
def test_nearest_formats(kind, name):
    assert nearest_format(kind) == name


def test_a_real_run_says_everything(tiny_model):
    model = tiny_model(seed=2, dim=64, layers=4, ffn=160, context=64)
    found = diagnose(
        Deployed("tiny", model, False, "the model itself"), prompt_tokens=24, output_tokens=8, threads=1,
        complaint="large", time_limit_s=2.0, rounds=4,
    )  # fmt: skip
    assert [phase.phase for phase in found.phases] == ["prefill", "decode"]
    names = {remedy.name for remedy in found.remedies}
    assert {"W8A8-g32", "W4A8-g32", "distil to 50%", "prune 25%", "prompt look-up", "batches of 4"} <= names
    assert {remedy.kind for remedy in found.remedies} == {"model structure", "decoding", "system"}
    by_memory = [remedy.gains["memory"].value for remedy in found.remedies if remedy.kind == "model structure"]
    assert by_memory == sorted(by_memory)
    assert by_memory[0] < 0.5  # f32 to 4 bits
    assert all("MODEL" in remedy.command or "trilemma" in remedy.command for remedy in found.remedies)
    assert 0 < found.kv_share_of_bytes < 1
    assert found.compute_macs_per_s > 1e8


def test_lengths_that_do_not_fit_are_refused_before_anything_is_opened(tiny_model):
    with pytest.raises(InputError, match="64 together"):
        diagnose(Deployed("tiny", tiny_model(), False, ""), prompt_tokens=60, output_tokens=8)


def test_a_gguf_file_is_run_as_a_twin(tmp_path, trilemma_export):
    opened = open_deployed(trilemma_export)
    assert opened.twin
    assert opened.foreign
    assert "Q8_0 as int8-g32" in opened.what
    assert opened.model.format_of("layers.0.ffn.up.weight") == "int8-g32"


@pytest.fixture(scope="module")
def trilemma_export(hearth_path, tmp_path_factory):
    from trilemma.api import export_model
    from trilemma.techniques.apply import compress

    folder = tmp_path_factory.mktemp("gguf")
    compress(hearth_path, folder / "w8", scheme="W8A8-g32")
    export_model(folder / "w8", folder / "w8.gguf")
    return folder / "w8.gguf"


def test_a_compute_rate_is_a_rate():
    found = compute_rate("int8-g32", "int8-g32", 1)
    assert found.macs_per_s > 1e9
    assert json.dumps(found._asdict())
