"""The precision ladder: every rung measured, and sentences that claim no more than the intervals carry."""

from __future__ import annotations

import shutil

import pytest

from trilemma.core.errors import InputError
from trilemma.core.ladder import Ladder, Rung
from trilemma.core.measurement import Measurement
from trilemma.model.write import write_checkpoint
from trilemma.report.triangle import Version, ladder_triangles, triangles
from trilemma.search.ladder import PRECISIONS, measure_ladder
from trilemma.search.ladder_findings import findings


@pytest.fixture(scope="module")
def tiny_folder(tiny_model, hearth_path, tmp_path_factory):
    """A random checkpoint with the shipped model's tokenizer."""
    folder = tmp_path_factory.mktemp("ladder") / "tiny"
    model = tiny_model(seed=3, vocab=8192, layers=2, context=64)
    write_checkpoint(model, folder, dtype="f32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hearth_path / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def ladder(tiny_folder, texts_path):
    return measure_ladder(
        tiny_folder, [texts_path], context=32, max_tokens=1200, prompt_tokens=16, output_tokens=4, repetitions=2,
        threads=1, repairs=["smooth+W8A8-g32"],
    )  # fmt: skip


def test_every_rung_is_measured(ladder):
    assert [rung.name for rung in ladder.rungs][: len(PRECISIONS)] == list(PRECISIONS)
    by_name = {rung.name: rung for rung in ladder.rungs}
    for name in PRECISIONS:
        rung = by_name[name]
        assert not rung.failed
        assert {"weights_bytes", "tpot_s", "ttft_s", "kl_mean", "build_s"} <= set(rung.measurements)
        assert rung.prefill_macs_per_s > 0
        assert rung.bandwidth_share > 0
    kl = {name: by_name[name].measurements["kl_mean"].value for name in by_name}
    assert kl["f32"] < kl["W8A8"] < kl["W4A8-g32"]
    assert abs(kl["bf16 arithmetic"]) > abs(kl["f16 arithmetic"])
    sizes = [by_name[name].measurements["weights_bytes"].value for name in ("f32", "bf16", "W8A8", "W4A8-g32")]
    assert sizes == sorted(sizes, reverse=True)


def test_the_picture_has_a_triangle_for_each_measured_rung(ladder):
    svg = ladder_triangles(ladder)
    assert svg.startswith("<svg")
    assert svg.count('class="shape') == len(PRECISIONS) + 1
    with pytest.raises(ValueError, match="no version"):
        triangles([], title="none")


def test_nearer_to_a_corner_is_better():
    svg = triangles([Version("a", 10, 1.0, 0.1), Version("b", 100, 0.1, 0.001)], title="two")
    assert svg.count('class="shape"') == 2


def made(name: str, kl: float, spread: float, repairs: str | None = None, failed: str = "") -> Rung:
    measured = {
        "kl_mean": Measurement.of("kl_mean", kl, ci95=(kl * (1 - spread), kl * (1 + spread))),
        "weights_bytes": Measurement.of("weights_bytes", 4e6),
        "build_s": Measurement.of("build_s", 3.0),
    }
    rates = {"prefill_macs_per_s": 1e10, "decode_bytes_per_s": 1e9}
    pair = {"tpot_s": (0.5, 0.4, 0.6), "ttft_s": (0.5, 0.4, 0.6)}
    return Rung(name=name, what="w", repairs=repairs, failed=failed, measurements=measured, relative=pair, **rates)


def sentences(*extra: Rung, largest: float = 100.0) -> list[str]:
    kls = {"f32": 1e-6, "W8A16": 1e-4, "W8A8-g32": 4e-3, "W4A16-g32": 0.01, "W4A8-g32": 0.012}
    rungs = [made(name, kl, 0.1) for name, kl in kls.items()]
    if not any(rung.name == "f16 arithmetic" for rung in extra):
        rungs.append(made("f16 arithmetic", 1e-6, 0.1))
    ladder = Ladder.model_construct(
        rungs=(*rungs, *extra), largest_activation=largest, largest_at="layers.1", outlier_ratio=80.0,
        outlier_at="layers.0.ffn.down",
    )  # fmt: skip
    return list(findings(ladder))


def test_instability_and_range_are_said_from_the_figures():
    said = " ".join(sentences())
    assert "int8 activations are unstable here: W8A8-g32 has 40.0x the KL of W8A16" in said
    assert "int8 activations hold: W4A8-g32 has 1.2x" in said
    assert "f16 arithmetic has room" in said
    assert "from overflow" in " ".join(sentences(largest=40_000.0))
    broken = made("f16 arithmetic", 1.0, 0.1, failed="The logits of window 0 are not finite.")
    assert "f16 arithmetic breaks" in " ".join(sentences(broken))


def test_a_repair_is_called_so_only_when_the_intervals_part():
    assert "repairs W8A8-g32" in sentences(made("smooth+W8A8-g32", 1e-4, 0.1, "W8A8-g32"))[-1]
    assert "no clear difference" in sentences(made("smooth+W8A8-g32", 3.9e-3, 0.1, "W8A8-g32"))[-1]
    assert "makes W8A8-g32 worse" in sentences(made("smooth+W8A8-g32", 9e-3, 0.1, "W8A8-g32"))[-1]


def test_random_weights_are_refused(shapes_path, texts_path):
    with pytest.raises(InputError, match="real weights"):
        measure_ladder(shapes_path / "SmolLM2-135M" / "config.json", [texts_path])


def test_rungs_that_do_not_fit_in_memory_are_refused_before_any_work(tiny_folder, texts_path, monkeypatch):
    monkeypatch.setattr("trilemma.search.ladder.total_memory_bytes", lambda: 1_000_000)
    monkeypatch.setattr("trilemma.search.ladder.apply_recipe", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(InputError, match="12 rungs side by side need about"):
        measure_ladder(tiny_folder, [texts_path], context=32)
