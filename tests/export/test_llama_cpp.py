"""The exported file in llama.cpp itself: the same greedy text, the same tokens, perplexity within 0.5%.

Needs llama-cpp-python, in this environment or in that of TRILEMMA_LLAMA_CPP (the path of a Python interpreter).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from trilemma.data.calibration import sample_calibration
from trilemma.data.documents import read_documents
from trilemma.export.gguf import export_gguf
from trilemma.formats.artifact import load_any
from trilemma.model.decoder import Decoder
from trilemma.model.rope import make_rope
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import SamplingSettings, open_engine
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.schemes import scheme_to_recipe

CONTEXT = 256
COUNT = 32


@cache
def interpreter() -> str | None:
    """The Python that has llama_cpp, or None."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return sys.executable
    return os.environ.get("TRILEMMA_LLAMA_CPP")


pytestmark = pytest.mark.skipif(
    interpreter() is None, reason="needs llama-cpp-python (or TRILEMMA_LLAMA_CPP: an interpreter that has it)"
)


def ask_llama_cpp(path: Path, prompt: list[int], windows: np.ndarray, texts: list[str]) -> dict:
    request = {"path": str(path), "context": 512, "prompt": prompt, "count": COUNT, "windows": windows.tolist(),
               "texts": texts}  # fmt: skip
    script = Path(__file__).with_name("llama_cpp_answers.py")
    done = subprocess.run(
        [interpreter(), str(script)], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def torch_perplexity(model, windows: np.ndarray) -> float:
    tokens = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        logits = Decoder.from_model(model)(tokens)[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).exp())


def engine_answers(model, prompt: list[int], windows: np.ndarray) -> tuple[list[int], float]:
    """Greedy tokens and perplexity in the native engine."""
    engine = open_engine(model)
    tokens = engine.generate(prompt, SamplingSettings(max_tokens=COUNT, ignore_eos=True)).tokens
    losses = []
    for window in windows:
        logits = torch.from_numpy(engine.logits(window)[:-1].astype(np.float64))
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(window[1:].astype(np.int64)))))
    engine.close()
    return tokens, float(np.exp(np.mean(losses)))


def gap_where_they_part(model, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """How far apart in f32 logits the two tokens are where the texts first differ; 0 when they are equal."""
    at = next((index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
    if at is None:
        return 0.0
    with torch.no_grad():
        logits = Decoder.from_model(model)(torch.tensor([prompt + ours[:at]]), last_only=True)[0, -1]
    return float((logits[ours[at]] - logits[theirs[at]]).abs())


def check(folder: Path, text: Path, scheme: str, tmp_path: Path, *, gap: float) -> None:
    tokenizer = Tokenizer.load(folder)
    documents = read_documents(text)
    windows = sample_calibration(documents, tokenizer.encode, CONTEXT, 3, seed=1)
    texts = [document.text[:600] for document in documents[:40]]
    prompt = tokenizer.encode("Once upon a time")
    model = apply_recipe(load_any(folder), scheme_to_recipe(scheme), Build())
    export_gguf(model, tmp_path / "model.gguf")
    theirs = ask_llama_cpp(tmp_path / "model.gguf", prompt, windows, texts)
    tokens, perplexity = engine_answers(model, prompt, windows)
    assert gap_where_they_part(model, prompt, tokens, theirs["tokens"]) <= gap
    assert theirs["perplexity"] == pytest.approx(perplexity, rel=5e-3)
    assert theirs["perplexity"] == pytest.approx(torch_perplexity(model, windows), rel=5e-3)
    assert theirs["encoded"] == [tokenizer.encode(text) for text in texts]


# Engines round 8-bit activations and 16-bit caches differently, so that near ties may fall to either side.
@pytest.mark.parametrize(("scheme", "gap"), [("f32", 0.02), ("W8A8-g32", 0.1), ("W4A8-g32", 0.1)])
def test_the_shipped_model_in_llama_cpp(scheme, gap, hearth_path, texts_path, tmp_path):
    check(hearth_path, texts_path, scheme, tmp_path, gap=gap)


@pytest.mark.shared
def test_stories260k_in_llama_cpp(shared_dir, tmp_path):
    folder = shared_dir / "models" / "stories260K"
    check(folder, shared_dir / "data" / "text" / "tinystories_1000.json", "f32", tmp_path, gap=0.02)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16.0}


@pytest.mark.parametrize(
    ("sizes", "kind", "parameters"),
    [
        ({"qkv_bias": True, "tied": False}, "default", {}),  # qwen2
        ({"qk_norm": True, "head_dim": 24}, "default", {}),  # qwen3
        ({"qk_norm": True, "tied": False}, "yarn", YARN),
        ({"head_dim": 24, "tied": False}, "default", {}),  # head_dim that is not dim / heads
        ({"theta": 5e5}, "llama3", LLAMA3),
        ({}, "linear", {"factor": 2.0}),
        ({}, "yarn", YARN),
        ({"qkv_bias": True}, "yarn", YARN),
    ],
)
def test_random_models_of_every_structure_in_llama_cpp(sizes, kind, parameters, tiny_model, tmp_path, random_generator):
    """Biases, heads of any size and every rope scaling: a wrong key or row order changes the loss at once."""
    model = tiny_model(seed=3, **{"dim": 64, "head_dim": 16, "ffn": 96, **sizes})
    rope = make_rope(kind, float(sizes.get("theta", 1e4)), parameters, head_dim=int(sizes.get("head_dim", 16)))
    layers = tuple(
        layer.model_copy(update={"attention": layer.attention.model_copy(update={"rope": rope})})
        for layer in model.config.layers
    )
    model = model.with_config(model.config.model_copy(update={"layers": layers}))
    export_gguf(model, tmp_path / "model.gguf")
    windows = random_generator.integers(0, 97, (4, 60)).astype(np.int32)
    theirs = ask_llama_cpp(tmp_path / "model.gguf", windows[0, :4].tolist(), windows, [])
    assert theirs["perplexity"] == pytest.approx(torch_perplexity(model, windows), rel=2e-3)
