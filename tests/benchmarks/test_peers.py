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

from peers import cells, dump, engines_of, summary  # noqa: E402

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
    for kind in engines_of.weight_kinds(storage):
        found = logits_of("openvino", folder, tmp_path / f"{kind}.xml", weights=kind, hint="f32", kv="f32", dynamic=0)
        assert off_by(found, expected["torch"]) < EXACT


@pytest.mark.parametrize("hint", ["f32", "bf16"])
def test_openvino_as_it_is_timed_is_near(dumped, tmp_path, hint):
    folder, storage, expected = dumped
    kind = engines_of.weight_kinds(storage)[0]
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
    left = dict(item for item in plan if not isinstance(item, cells.Group))
    assert left["decode at 4096"] == "the model's context is 256"
    assert set(left) == {"prefill 512", "prefill 2048", "decode at 512", "decode at 4096", "decode at 16384"}
    assert all(isinstance(item, cells.Group) for item in cells.groups_of(32768))


def rows_of_two_rounds() -> list[dict[str, object]]:
    about = {"shape": "s", "format": "int4-g32", "kv": "16", "cell": "prefill 512", "bytes_per_token": 2.0,
             "macs_per_token": 5.0, "way": {}}  # fmt: skip
    rates = {("ours", 0): [30.0, 50.0], ("ours", 1): [60.0], ("a", 0): [20.0], ("a", 1): [20.0], ("b", 0): [50.0]}
    runs = [
        {"record": "run", **about, "engine": engine, "round": turn, "rates": values}
        for (engine, turn), values in rates.items()
    ]
    probe = {"record": "ceilings", "shape": "s", "format": "int4-g32", "read_bytes_per_s": 100.0}
    return [{**probe, "int8_macs_per_s": 400.0}, {**probe, "int8_macs_per_s": 500.0}, *runs]


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


def test_a_worker_that_fails_says_its_last_words():
    with pytest.raises(engines_of.EngineFailedError, match="KeyError"):
        engines_of.run_worker(sys.executable, "ours", {"threads": 1})


def test_the_entry_explains_itself():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "engines.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--openvino-python" in done.stdout
