"""Quality per byte: the windows, the words for recipes, what stands against what, and rows that are not computed twice.

Oracles: the torch reference's logits, llama.cpp's way of cutting chunks written out, GGUF's own account of which type
holds which format. A Python that TRILEMMA_AUTO_ROUND_PYTHON, TRILEMMA_GPTQMODEL_PYTHON or
TRILEMMA_LLM_COMPRESSOR_PYTHON names lets that peer run.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from trilemma.core.errors import InputError, RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats import FORMATS
from trilemma.formats.artifact import load_any, write_artifact
from trilemma.formats.gguf.blocks import target_of
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.technique import Build

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import quality_per_byte
import weights_alone
from quality import llama_cpp, recipes, speed, verdicts, yard

CALIBRATE = "Once upon a time there was a little girl who lived beside the sea, and her boat was red. " * 60
JUDGE = "A fox came down to the river one morning, and found that the water had gone away over night. " * 30


@pytest.fixture(scope="module")
def small(hearth_path, tmp_path_factory):
    """Windows of 64 tokens: 5 calibrate, 2 choose, 3 judge."""
    folder = tmp_path_factory.mktemp("yard")
    return yard.make_yard(hearth_path, CALIBRATE, JUDGE, folder, context=64, windows=(5, 2, 3), threads=1), folder


def test_calibration_windows_are_the_chunks_of_the_text_that_llama_imatrix_reads(small, hearth_path):
    made, _ = small
    tokens = Tokenizer.load(hearth_path).encode(made.calibration_text)
    chunks = [tokens[at : at + 64] for at in range(0, len(tokens) - 63, 64)]
    for chunk in chunks:
        chunk[0] = load_any(hearth_path).config.bos_token_id
    assert made.calibration.tolist() == chunks
    assert len(chunks) == 5


def test_the_three_kinds_of_windows_are_disjoint(small):
    made, _ = small
    calibrating = {tuple(window[1:]) for window in made.calibration}
    assert made.choosing.shape == (2, 64)
    assert made.judging.shape == (3, 64)
    assert not calibrating & {tuple(window[1:]) for window in (*made.choosing, *made.judging)}


def test_the_reference_is_the_torch_engine_in_f32_and_is_not_made_twice(small, hearth_path):
    made, folder = small
    engine = open_engine(hearth_path, runtime="torch", options=EngineOptions(threads=1, kv_cache="f32"))
    np.testing.assert_array_equal(made.reference[2], engine.logits(made.judging[0]))
    engine.close()
    (path,) = folder.glob("*-reference.npy")
    before = path.stat().st_mtime_ns
    again = yard.make_yard(hearth_path, CALIBRATE, JUDGE, folder, context=64, windows=(5, 2, 3), threads=1)
    other = yard.make_yard(hearth_path, CALIBRATE, JUDGE, folder, context=64, windows=(4, 2, 3), threads=1)
    assert path.stat().st_mtime_ns == before
    assert again.key == made.key != other.key


def test_divergences_are_near_nothing_unquantized_and_more_with_fewer_bits(small):
    made, _ = small
    model = load_any(made.model)
    found = {}
    for scheme in ("f32", "W8A8-g32", "W4A8-g32"):
        candidate = apply_recipe(model, scheme_to_recipe(scheme), Build())
        choosing, judging = made.divergences(open_engine(candidate, options=made.options()))
        assert (len(choosing), len(judging)) == (2, 3)
        found[scheme] = judging.mean()
    assert found["f32"] < 1e-4 < found["W8A8-g32"] * 10 < found["W4A8-g32"]


@pytest.mark.parametrize(
    ("word", "technique", "formats", "steps"),
    [("W4A8-g32-gptq", "gptq", ("int4-g32", "int8-g32"), 1),
     ("guided:int4-g64/int5-g32-k", "gptaq", ("int4-g64", "int5-g32-k"), 1),
     ("rtn:int3-g16/int4-g32-k+scales7", "rtn", ("int3-g16", "int4-g32-k"), 2),
     ("smooth+sign:int3-g16/int4-g32-k+scales7", "sign-rounding", ("int3-g16", "int4-g32-k"), 3)],
)  # fmt: skip
def test_words(word, technique, formats, steps):
    recipe = recipes.read_word(word, "any")
    assert recipe.name == word
    step = recipe.steps[steps == 3]
    assert step.technique == technique
    assert (step.settings["weights"], step.settings["embedding"]) == formats
    assert len(recipe.steps) == steps


def test_words_that_name_files_and_models(tmp_path):
    recipe = Recipe(steps=(Step(technique="rtn", settings={"weights": "int4-g32"}),))
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    (tmp_path / "mine.json").write_text(recipe.model_dump_json())
    for name in ("mine.yaml", "mine.json"):
        found = recipes.read_word(f"hearth={tmp_path / name}", "hearth")
        assert (found.name, found.steps) == ("mine", recipe.steps)
        assert recipes.read_word(f"hearth={tmp_path / name}", "spiky") is None
    with pytest.raises(InputError, match="methods: guided"):
        recipes.read_word("best:int4-g32/int8-g32", "any")
    with pytest.raises(RecipeError, match="W9A9"):
        recipes.read_word("W9A9", "any")


def test_other_formats_reach_the_model(hearth_path):
    model = load_any(hearth_path)
    base = recipes.read_word("rtn:int4-g64/int8-g32", "any")
    ends = apply_recipe(model, recipes.with_ends(base, "int6-g16-k"), Build())
    assert ends.format_of("embedding.weight") == "int6-g16-k"
    assert ends.format_of("layers.3.ffn.up.weight") == "int4-g64"
    names = [name for name, shape in model.config.tensor_shapes().items() if len(shape) == 2]
    wanted = {name: ("int4-g32", "int5-g32-k", "int8-g32")[at % 3] for at, name in enumerate(names)}
    made = apply_recipe(model, recipes.with_formats(base, wanted), Build())
    assert {name: made.format_of(name) for name in names} == wanted


@pytest.mark.parametrize("kind", llama_cpp.FORMAT_OF)
def test_formats_are_those_that_gguf_holds_in_the_same_type(kind):
    assert target_of(FORMATS.get(llama_cpp.FORMAT_OF[kind]), 256).type == kind


def test_a_type_without_a_format_is_named():
    with pytest.raises(InputError, match="IQ2_XS"):
        llama_cpp.formats_like({"embedding.weight": "Q6_K", "layers.0.ffn.up.weight": "IQ2_XS"})


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(("chunks", "good"), [(5, True), (4, False)])
def test_the_importance_matrix_must_have_seen_the_same_windows(small, tmp_path, chunks, good):
    made, _ = small
    with pytest.raises(InputError, match="llama-quantize"):
        llama_cpp.Tools(tmp_path, tmp_path, 1)
    tool(tmp_path, "llama-quantize", "exit 1")
    tool(tmp_path, "llama-imatrix", f'echo "computing over {chunks} chunks"; touch "$6"; [ "$5" = -o ]')
    tools = llama_cpp.Tools(tmp_path, tmp_path, 1)
    if good:
        assert tools.importance(made).exists()
        with pytest.raises(InputError, match="llama-quantize --imatrix"):
            tools.quantized(made, "Q4_0")
    else:
        with pytest.raises(InputError, match="saw 4 chunks; 5 windows"):
            tools.importance(made)


def row(side: str, name: str, size: int, kl: float, **more: object) -> dict[str, object]:
    windows = (kl * np.array([0.9, 1.0, 1.1, 0.95, 1.05, 1.0])).tolist()
    return {"yard": "y", "model": "m", "side": side, "name": name, "bytes": size, "kl": kl, "choosing_kl": kl,
            "windows": windows, "ends": "int8-g32/int8-g32", **more}  # fmt: skip


def test_the_best_that_fits_stands_against_a_type():
    rows = [row("ours", "large", 101, 0.1), row("ours", "best", 100, 0.2), row("ours", "lucky", 90, 0.19),
            row("ours", "equal", 80, 0.4, ends="e/e"), row("ours", "W8A8-g32", 300, 0.009),
            row("llama.cpp", "Q4_K_M", 100, 0.5, ends="e/e"), row("llama.cpp", "Q8_0", 200, 0.01),
            row("llama.cpp", "Q2_K", 50, 2.0)]  # fmt: skip
    rows[2]["choosing_kl"] = 0.3  # better on the windows that judge alone
    found = {(bout.what, bout.theirs["name"]): bout for bout in verdicts.bouts_of(rows, {"Q4_K_M": 0.7, "Q2_K": 0.7})}
    free, equal = found["same bytes", "Q4_K_M"], found["same bytes, ends equal", "Q4_K_M"]
    assert (free.ours["name"], equal.ours["name"]) == ("best", "equal")
    assert free.ratio.value == pytest.approx(0.4)
    assert (free.verdict, equal.verdict) == ("PASS", "FAIL")
    assert (found["same bytes", "Q2_K"].ours, found["same bytes", "Q2_K"].verdict) == (None, "NONE")
    assert "nothing fits" in found["same bytes", "Q2_K"].line()
    assert found["scheme", "Q8_0"].verdict == "PASS"


@pytest.mark.parametrize(
    ("ours", "bar", "verdict"),
    [([0.5, 0.5, 0.5, 0.5, 0.5, 0.6], 0.7, "PASS"), ([0.1, 0.1, 3.4, 0.1, 0.1, 0.1], 0.7, "INCONCLUSIVE"),
     ([0.8, 0.8, 0.8, 0.8, 0.8, 0.9], 0.7, "FAIL"), ([1.05, 1.0, 1.0, 1.0, 1.0, 1.0], 1.1, "PASS")],
)  # fmt: skip
def test_verdicts_need_ratio_and_interval(ours, bar, verdict):
    bout = verdicts.Bout("same bytes", "m", row("llama.cpp", "Q", 1, 1.0) | {"windows": [1.0] * 6},
                         row("ours", "o", 1, 1.0) | {"windows": ours}, bar)  # fmt: skip
    assert bout.verdict == verdict
    speeds = {("m", "o", "Q"): {"ours": [30.0, 20.0], "theirs": [10.0, 24.0]}}
    assert bout.line(speeds).endswith(f"| {verdict} | 1.25 |")


def test_finished_rows_are_not_computed_again(small, tmp_path):
    made, _ = small
    path, calls = tmp_path / "rows.jsonl", []

    def compute() -> dict[str, object]:
        calls.append(1)
        return {name: value for name, value in row("", "", 10, len(calls)).items() if value not in ("", "y", "m")}

    bench = quality_per_byte.Bench(made, None, tmp_path, path, [])
    first, second = bench.row("ours", "a", compute), bench.row("ours", "a", compute)
    assert (len(calls), first["kl"], second["kl"]) == (1, 1, 1)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert quality_per_byte.Bench(made, None, tmp_path, path, kept).row("ours", "a", compute)["kl"] == 1
    other = quality_per_byte.Bench(made, None, tmp_path, path, kept, again=["ours"])
    assert [other.row("ours", "a", compute)["kl"] for _ in range(2)] == [2, 2]  # anew once
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "| 2.0000e+00 |" in quality_per_byte.report(lines, [made.key])  # the newest counts
    assert "| 1.0000e+00 |" not in quality_per_byte.report(lines, [made.key])


def test_a_whole_run_without_peers(small, tmp_path):
    made, _ = small
    options = argparse.Namespace(types="", ours=["W4A8-g32", "hearth-7m=W8A8-g32", "other=W8A8"], exported=[],
                                 kv_of=["f32"], speed_rounds=0)  # fmt: skip
    rows: list[dict[str, object]] = []
    quality_per_byte.measure(quality_per_byte.Bench(made, None, tmp_path, None, rows), options)
    found = {(line["side"], line["name"], line.get("kv")): line for line in rows}
    assert set(found) == {("ours", "W4A8-g32", None), ("ours", "W8A8-g32", None), ("kv", "f32", "int8"),
                          ("kv", "f32", "int4")}  # fmt: skip
    assert 0 < found["kv", "f32", "int8"]["kl"] < found["kv", "f32", "int4"]["kl"]
    assert "| hearth-7m | f32 | int4 |" in quality_per_byte.report(rows, [])


def test_decode_is_held_against_the_best_of_the_peers_set_ups(small, tmp_path):
    made, _ = small
    write_artifact(apply_recipe(load_any(made.model), scheme_to_recipe("W4A8-g32"), Build()), tmp_path / "a", Recipe())
    answer = '[{"n_prompt": 0, "n_depth": 0, "samples_ts": [3, \'$rate\'], "build_commit": "c"}]'
    tool(tmp_path, "llama-bench", f"case \"$*\" in *'-fa off'*) rate=50;; *) rate=40;; esac; echo '{answer}'")
    found = speed.decode_rates(tmp_path / "a", tmp_path / "none.gguf", tmp_path / "llama-bench", 1, 2)
    assert found["theirs"] == [50.0, 50.0]
    assert len(found["ours"]) == 2
    assert min(found["ours"]) > 0


def test_weights_alone_round_nothing_but_weights(small):
    made, _ = small
    model = load_any(made.model)
    assert max(weights_alone.judged(made, model)) < 1e-6
    rounded = apply_recipe(model, scheme_to_recipe("W8A8-g32-e16"), Build())
    wide = {name: rounded.tensor(name) for name in model.config.tensor_shapes()}
    assert weights_alone.judged(made, rounded) == weights_alone.judged(made, model.with_tensors(wide))


def test_ours_may_use_fewer_of_the_windows(small, monkeypatch):
    made, _ = small
    seen = []

    def apply(model, recipe, build):
        seen.append((recipe.steps, build.calibration))
        return model

    monkeypatch.setattr(weights_alone, "apply_recipe", apply)
    monkeypatch.setattr(weights_alone, "judged", lambda *_: [])
    for word in ("gptq", "gptq+scales7@3"):
        assert weights_alone.run_ours(made, word, 3, 128)["windows"] == []
    (first, whole), (second, fewer) = seen
    np.testing.assert_array_equal(whole, made.calibration)
    np.testing.assert_array_equal(fewer, made.calibration[[0, 2, 4]])
    wanted = {"weights": "int3-g128", "embedding": "bf16", "activations": "bf16"}
    assert [steps[0].settings for steps in (first, second)] == [wanted, wanted]
    assert [step.technique for step in second] == ["gptq", "tune-scales"]


def test_the_report_of_weights_alone_holds_kl_and_time_against_their_bars():
    def run(side: str, who: str, kl: float, seconds: float) -> dict[str, object]:
        return row(side, who, 0, kl) | {"bits": 4, "group": 32, "who": who, "seconds": seconds, "cpu_seconds": seconds}

    rows = [run("peer", "auto-round", 1.0, 10), run("ours", "gptq", 0.9, 9), run("ours", "gptq", 0.9, 4),
            run("ours", "slow", 0.9, 6), run("ours", "worse", 1.1, 1)]  # fmt: skip
    lines = weights_alone.report(rows).splitlines()
    assert next(line for line in lines if "| gptq | auto-round |" in line).endswith("| 0.40 | 0.40 | PASS |")
    assert next(line for line in lines if "| slow | auto-round |" in line).endswith("| 0.60 | 0.60 | FAIL: time |")
    assert next(line for line in lines if "| worse | auto-round |" in line).endswith("| 0.10 | 0.10 | FAIL: KL |")


@pytest.mark.parametrize(("peer", "more"), [("auto-round", ":iters=2"), ("gptqmodel", ""), ("llm-compressor", "")])
def test_a_peer_leaves_matrices_on_the_grid_it_was_asked_for(small, tmp_path, peer, more):
    python = os.environ.get(f"TRILEMMA_{peer.replace('-', '_').upper()}_PYTHON")
    if not python:
        pytest.skip(f"name a Python that has {peer}")
    made, _ = small
    found = weights_alone.run_peer(made, peer + more, 4, 32, python, tmp_path)
    assert 1e-4 < np.mean(found["windows"]) < 0.5
    weight = load_any(tmp_path / f"{made.name}-{peer}").tensor("layers.2.ffn.down.weight")
    assert max(len(np.unique(group.round(7))) for group in weight.reshape(-1, 32)) <= 16
