"""The peers of benchmarks/engines.py compute what we compute, on the same weights; the plan and the report are sound.

A peer that is not importable here may run in a Python of its own, which TRILEMMA_OPENVINO_PYTHON or
TRILEMMA_ONNXRUNTIME_PYTHON names. Oracle of the graphs: the torch reference with f32 inputs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trilemma.core.errors import UnsupportedModelError
from trilemma.core.recipe import Recipe
from trilemma.formats.artifact import load_any, write_artifact
from trilemma.formats.random_weights import with_random_weights
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from peers import bars, book, build, cells, dump, engines_of, summary, ways  # noqa: E402

CALLS = [[5, 6, 7, 100, 200], [299, 17, 3, 9], [12], [44], [8]]  # a prompt, a second part of it, three steps
EXACT = 0.003  # of the logits' norm: f32 throughout
ROUNDED = 0.05  # 8-bit or bf16 inputs, which random weights amplify; a wrong mask or matrix is off by 0.2 or more


@pytest.fixture(scope="module", params=["int4-g32", "int8-g32"])
def dumped(request, tmp_path_factory, shapes_path):
    """A tiny llama with scaled rotation and shared KV heads: artifact, dump, format, our own logits."""
    folder = tmp_path_factory.mktemp(request.param)
    config = json.loads((shapes_path / "Llama-3.2-1B" / "config.json").read_text())
    config |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2,
               "max_position_embeddings": 2048}  # fmt: skip
    (folder / "shape").mkdir()
    (folder / "shape" / "config.json").write_text(json.dumps(config))
    model = with_random_weights(load_any(folder / "shape"), lambda _: request.param)
    write_artifact(model, folder / "artifact", Recipe(name="random", steps=()))
    dump.write_dump(folder / "artifact", folder / "dump")
    tokens = [token for call in CALLS for token in call]
    exact = with_random_weights(load_any(folder / "shape"), lambda _: request.param, activation_of=lambda _: "f32")
    expected = {}
    for runtime, opened in (("torch", exact), ("native", load_any(folder / "artifact"))):
        engine = open_engine(opened, runtime=runtime, options=EngineOptions(threads=1, kv_cache="f32"))
        rows = engine.logits(tokens)
        expected[runtime] = rows[np.cumsum([len(call) for call in CALLS]) - 1]
        engine.close()
    return folder, request.param, expected


def python_of(package: str) -> str:
    named = os.environ.get(f"TRILEMMA_{package.upper()}_PYTHON")
    if not named and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: install it, or name a Python that has it in TRILEMMA_{package.upper()}_PYTHON")
    return named or sys.executable


def logits_of(package: str, folder: Path, model: Path, **settings: object) -> np.ndarray:
    python = python_of(package)
    engines_of.run_worker(
        python, package, {"do": "build", "dump": str(folder / "dump"), "model": str(model), **settings}
    )
    task = {"do": "logits", "model": str(model), "threads": 1, "calls": CALLS, **settings}
    return np.asarray(engines_of.run_worker(python, package, task)["logits"])


def off_by(found: np.ndarray, expected: np.ndarray) -> float:
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


def test_openvino_computes_the_same_logits(dumped, tmp_path):
    folder, storage, expected = dumped
    for kind in ways.weight_kinds(storage):
        found = logits_of("openvino", folder, tmp_path / f"{kind}.xml", weights=kind, hint="f32", kv="f32", dynamic=0)
        assert off_by(found, expected["torch"]) < EXACT


@pytest.mark.parametrize("hint", ["f32", "bf16"])
def test_openvino_as_it_is_timed_is_near(dumped, tmp_path, hint):
    folder, storage, expected = dumped
    kind = ways.weight_kinds(storage)[0]
    found = logits_of("openvino", folder, tmp_path / "m.xml", weights=kind, hint=hint, kv="f16")
    assert off_by(found, expected["torch"]) < ROUNDED
    assert off_by(found, expected["native"]) < ROUNDED


def test_onnxruntime_computes_the_same_logits(dumped, tmp_path):
    folder, _, expected = dumped
    exact = logits_of("onnxruntime", folder, tmp_path / "exact.onnx", accuracy=1)
    assert off_by(exact, expected["torch"]) < EXACT
    found = logits_of("onnxruntime", folder, tmp_path / "timed.onnx")
    assert off_by(found, expected["native"]) < ROUNDED


def test_the_dump_is_the_model(dumped):
    folder, storage, _ = dumped
    model = load_any(folder / "artifact")
    about = json.loads((folder / "dump" / "model.json").read_text())
    assert (about["format"], about["heads"], about["kv_heads"], about["vocab"]) == (storage, 4, 2, 300)
    for name, shape in model.config.tensor_shapes().items():
        if len(shape) == 1:
            values = np.load(folder / "dump" / f"{name}.npy")
        else:
            codes, scales = (np.load(folder / "dump" / f"{name}.{part}.npy") for part in ("codes", "scales"))
            values = codes.astype(np.float32) * np.repeat(scales.astype(np.float32), about["group"], axis=1)
        np.testing.assert_array_equal(values, model.tensor(name))


def test_what_the_graphs_can_not_say_is_refused(hearth_path, shapes_path, tmp_path):
    with pytest.raises(UnsupportedModelError, match="symmetric"):
        dump.write_dump(hearth_path, tmp_path / "plain")
    with pytest.raises(UnsupportedModelError, match="llama"):
        dump.describe(load_any(shapes_path / "Qwen2.5-0.5B").config)


def test_cells_beyond_the_context_are_left_out_with_a_reason():
    plan = list(cells.groups_of(256))
    groups = [item for item in plan if isinstance(item, cells.Group)]
    assert [cell.name for group in groups for cell in group.cells] == [
        "prefill 128", "decode at 0", "decode x4 at 128", "decode x8 at 128", "decode x16 at 128",
    ]  # fmt: skip
    assert all(len({cell.rank for cell in group.cells}) == 1 for group in groups)
    left = dict(item for item in plan if not isinstance(item, cells.Group))
    assert left["decode at 4096"] == "the model's context is 256"
    assert set(left) == {"prefill 512", "prefill 2048", "decode at 512", "decode at 4096", "decode at 16384"}
    assert all(isinstance(item, cells.Group) for item in cells.groups_of(32768))
    opening = [item for item in cells.groups_of(256, opening=True) if isinstance(item, cells.Group)]
    assert [cell.cold for group in opening if group.name == "open" for cell in group.cells] == [False, True]


ABOUT = {"shape": "s", "format": "int4-g32", "kv": "16", "threads": 2, "bytes_per_token": 2.0, "macs_per_token": 5.0,
         "way": {}}  # fmt: skip


def runs_of(cell: str, rates: dict[tuple[str, int], list[float]], **about: object) -> list[dict[str, object]]:
    return [
        {"record": "run", **ABOUT, **about, "cell": cell, "engine": engine, "round": turn, "rates": values}
        for (engine, turn), values in rates.items()
    ]


def rows_of_two_rounds() -> list[dict[str, object]]:
    rates = {("ours", 0): [30.0, 50.0], ("ours", 1): [60.0], ("a", 0): [20.0], ("a", 1): [20.0], ("b", 0): [50.0]}
    probe = {"record": "ceilings", "shape": "s", "format": "int4-g32", "read_bytes_per_s": 100.0}
    return [{**probe, "int8_macs_per_s": 400.0}, {**probe, "int8_macs_per_s": 500.0}, *runs_of("prefill 512", rates)]


def test_figures_are_medians_paired_by_round_beside_the_nearer_ceiling():
    (one,) = summary.figures_of(rows_of_two_rounds())
    assert one.median("ours") == 50.0
    assert one.ratios("a") == [2.0, 3.0]
    assert one.ratios("b") == [0.8]  # the round that both have
    assert one.best_peer == "b"
    assert one.share("ours") == pytest.approx(50 * max(2 / 100, 5 / 500))
    words = summary.table([one], ["ours", "a", "b"])
    assert "| 50 (40..60), 100% | 20 (20..20), 40% | 50, 100% | 2.50 (2.00..3.00) | 0.80 | 0.80 b |" in words
    picture = summary.plot([one], ["ours", "a", "b"], "title")
    assert picture is not None
    assert "<svg" in picture


def test_ceilings_are_the_best_of_probes_that_could_hold_here():
    probe = {"record": "ceilings", "format": "int4-g32", "kernel_macs_per_s": 1.0}
    rows = [
        {**probe, "shape": "small", "bytes": 1_000_000, "read_bytes_per_s": 90.0, "int8_macs_per_s": 5.0},
        {**probe, "shape": "large", "bytes": 900_000_000, "read_bytes_per_s": 40.0, "int8_macs_per_s": 6.0},
        {**probe, "shape": "huge", "bytes": 2_000_000_000, "read_bytes_per_s": 50.0, "int8_macs_per_s": 4.0},
        {**probe, "shape": "huge", "format": "int8-g32", "bytes": 10**10, "read_bytes_per_s": 30.0,
         "int8_macs_per_s": 4.0, "kernel_macs_per_s": 3.0},
    ]  # fmt: skip
    large, small = summary.ceilings_of(rows, "large", "int4-g32"), summary.ceilings_of(rows, "small", "int4-g32")
    assert (large["read_bytes_per_s"], large["int8_macs_per_s"], large["kernel_macs_per_s"]) == (50.0, 6.0, 1.0)
    assert small["read_bytes_per_s"] == 90.0  # in a cache: the large model's probes know nothing of it
    deep = summary.ceilings_of(rows, "small", "int4-g32", 9e8)
    assert deep["read_bytes_per_s"] == 90.0  # nothing of its own was probed as far: the nearest known
    rows.append({**rows[0], "bytes": 800_000_000, "read_bytes_per_s": 45.0})
    assert summary.ceilings_of(rows, "small", "int4-g32", 8e8)["read_bytes_per_s"] == 50.0
    assert summary.ceilings_of(rows, "other", "int4-g32") == {}


def test_bars_say_met_not_met_and_open():
    about = {"shape": "Llama-3.2-1B", "macs_per_token": 1.0}
    rates = {("ours", 0): [95.0], ("ours", 1): [97.0], ("llama.cpp", 0): [50.0], ("llama.cpp", 1): [48.0],
             ("openvino", 0): [80.0], ("openvino", 1): [82.0]}  # fmt: skip
    rows = [
        {"record": "ceilings", "shape": "Llama-3.2-1B", "format": "int4-g32", "bytes": 10, "read_bytes_per_s": 100.0,
         "int8_macs_per_s": 120.0, "kernel_macs_per_s": 84.0},
        *runs_of("prefill 512", rates, **about, bytes_per_token=0.1),
        *runs_of("decode at 0", rates, **about, bytes_per_token=1.0),
        *runs_of("prefill 512", {("ours", 0): [94.0], ("ours", 1): [90.0]}, **{**about, "kv": "8"}),
        {"record": "files", "shape": "Llama-3.2-1B", "format": "int4-g32", "bytes": {"ours": 1000, "llama.cpp": 1020}},
    ]  # fmt: skip
    found = {(bar.where, bar.what): bar for bar in bars.bars_of(rows)}
    against = found["Llama-3.2-1B int4-g32 prefill 512", "ours / llama.cpp's best"]
    assert against.found == pytest.approx((95 / 50 + 97 / 48) / 2)
    assert against.met is False
    assert found["Llama-3.2-1B int4-g32 prefill 512", "ours / best of the peers"].found == pytest.approx(
        (95 / 80 + 97 / 82) / 2
    )
    assert found["Llama-3.2-1B int4-g32", "share of the integer ceiling, matrix product alone"].found == 84 / 120
    share = found["Llama-3.2-1B int4-g32 decode at 0", "share of the best read bandwidth of any probe"]
    assert (share.found, share.met) == (pytest.approx(0.96), True)
    assert found["Llama-3.2-1B int4-g32 prefill 512", "int8 cache / bf16 cache, ours"].found == pytest.approx(
        (94 / 95 + 90 / 97) / 2
    )
    assert found["Llama-3.2-1B int4-g32", "bytes of weights, apart from llama.cpp's"].met is False
    assert found["stories-15M int8-g32 decode at 0", "ours / best of the peers"].met is None
    assert "beside" not in share.words
    # a host in its slower state: 98% and 96% of what probes read just before and after
    for row in rows:
        if row.get("cell") == "decode at 0" and row["engine"] == "ours":
            row["reads"] = [row["rates"][0] / (0.98 if row["round"] else 0.96)]
    beside = {(bar.where, bar.what): bar for bar in bars.bars_of(rows)}[share.where, share.what]
    assert beside.words == "96 tokens/s, 97% of the probes beside it"
    words = bars.bars_table(rows)
    assert "| NOT MET | Llama-3.2-1B int4-g32 prefill 512 | ours / llama.cpp's best | >= 2.00 | 1.96 |" in words
    assert "| open | stories-15M int8-g32 decode at 0 |" in words


def test_a_book_carries_on_where_its_file_ends(tmp_path):
    path, about = tmp_path / "rows.jsonl", {"shape": "s", "format": "f", "kv": "16", "threads": 2, "engine": "ours"}
    first = book.Book(path)
    first.add("run", **about, cell="prefill 512", round=0, rates=[1.0], seconds=3.0)
    first.add("trial", **about, cell="prefill 512", round=None, rates=[2.0], way={"flash": "on"})
    again = book.Book(path)
    assert again.has_run(**about, cell="prefill 512", round=0)
    assert not again.has_run(**about, cell="prefill 512", round=1)
    assert not again.has_run(**{**about, "kv": "8"}, cell="prefill 512", round=0)
    assert again.seconds(**about, cell="prefill 512") == 3.0
    assert [row["way"] for row in again.trials(**about, cell="prefill 512")] == [{"flash": "on"}]
    merged = book.read_rows([path, path])
    assert len({row["round"] for row in merged if row["record"] == "run"}) == 2  # rounds of two files are not one


def test_set_ups_are_changed_one_at_a_time_and_joined():
    cell = cells.Cell("prefill", 2048)
    changes = ways.changes_of("llama.cpp", "int4-g32", "16", cell)
    assert all(len(change) == 1 for change in changes)
    assert {"ubatch": 2048} in changes
    assert {"flash": "off"} not in ways.changes_of("llama.cpp", "int4-g32", "8", cell)
    assert ways.changes_of("ours", "int4-g32", "16", cell) == []
    default = {"a": 1, "b": 1, "c": 1}
    tried = [({"a": 2}, 12.0), ({"a": 3}, 13.0), ({"b": 2}, 11.0), ({"c": 2}, 9.0)]
    assert ways.combined(default, tried, 10.0) == {"a": 3, "b": 2, "c": 1}
    assert ways.combined(default, tried[:2], 10.0) is None


def test_a_bare_config_gets_room(shapes_path, hearth_path, tmp_path):
    roomy = build.stretched(shapes_path / "stories-15M", tmp_path, 5000)
    before, after = load_any(shapes_path / "stories-15M").config, load_any(roomy).config
    assert roomy.name == "stories-15M"
    assert (before.max_context, after.max_context) == (256, 5000)
    assert after.layers == before.layers
    assert build.stretched(hearth_path, tmp_path, 5000) == hearth_path  # trained weights stay as they are


def test_a_worker_that_fails_says_its_last_words():
    with pytest.raises(engines_of.EngineFailedError, match="KeyError"):
        engines_of.run_worker(sys.executable, "ours", {"threads": 1})


def test_the_entry_explains_itself():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "engines.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--openvino-python" in done.stdout
    assert "--bars" in done.stdout
