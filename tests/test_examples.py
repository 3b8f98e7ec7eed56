"""What ships under examples/ is what its pages say: the stress model, the texts, the shapes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from trilemma.data.documents import read_documents
from trilemma.model.checkpoint import read_checkpoint
from trilemma.model.cost import inspect_model
from trilemma.model.plain import bf16_to_f32, f32_to_bf16
from trilemma.runtime import open_engine


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def spiky_script(repository):
    return load(repository / "examples" / "make_spiky.py")


@pytest.fixture(scope="module")
def hearth(hearth_path):
    return read_checkpoint(hearth_path)


def test_the_stress_model_is_the_same_function_to_the_bit_of_its_weights(spiky_script, hearth):
    spiky = spiky_script.make_spiky(hearth, seed=5)
    tokens = np.random.default_rng(1).integers(0, hearth.config.vocab_size, 64).astype(np.int32)
    assert spiky_script.largest_relative_difference(hearth, spiky, tokens) <= 1e-6
    for name in spiky:
        values = spiky.tensor(name)
        np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(values)), values, err_msg=name)


def test_the_stress_model_has_outliers_that_the_original_has_not(spiky_script, hearth):
    spiky = spiky_script.make_spiky(hearth)
    for name in ("layers.2.attention_norm.weight", "layers.4.ffn_norm.weight"):
        gains = np.abs(spiky.tensor(name))
        assert gains.max() > 10 * np.median(gains)
        assert np.abs(hearth.tensor(name)).max() < 10 * np.median(np.abs(hearth.tensor(name)))
    rows = np.abs(spiky.tensor("layers.0.ffn.up.weight")).max(axis=1)
    assert rows.max() > 10 * np.median(rows)


def test_the_stress_model_works_with_biases_and_odd_shapes(spiky_script, tiny_model):
    model = tiny_model(seed=2, dim=40, qkv_bias=True, tied=False, ffn=52)
    spiky = spiky_script.make_spiky(model)
    tokens = np.arange(20, dtype=np.int32)
    first, second = open_engine(model).logits(tokens), open_engine(spiky).logits(tokens)
    np.testing.assert_allclose(second, first, atol=1e-5 * np.abs(first).max())


def test_the_texts_are_documents_that_share_nothing(texts_path):
    documents = read_documents(texts_path)
    assert len(documents) >= 60
    seen: set[tuple[str, ...]] = set()
    for document in documents:
        words = document.text.lower().split()
        grams = {tuple(words[i : i + 13]) for i in range(len(words) - 13)}
        assert len(grams & seen) < 0.01 * len(grams), document.source
        seen |= grams
    assert all("gutenberg" not in document.text.lower() for document in documents)


@pytest.mark.shared
def test_the_texts_are_what_the_script_makes(repository, shared_dir, texts_path):
    prepare = load(repository / "examples" / "texts" / "prepare.py")
    books = (shared_dir / "data" / "text" / "books-kids-valid.txt").read_text(encoding="utf-8")
    wanted = "".join(f"{document}\n{prepare.END}\n" for document in prepare.documents(books))
    assert texts_path.read_text(encoding="utf-8") == wanted


PARAMETERS = {
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "Qwen2.5-0.5B": 494_032_768,
    "Llama-3.2-1B": 1_235_814_400,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_the_shapes_have_the_published_number_of_parameters(shapes_path, name, count):
    assert inspect_model(read_checkpoint(shapes_path / name)).parameters == count
    assert json.loads((shapes_path / name / "config.json").read_text())["torch_dtype"] == "bfloat16"
