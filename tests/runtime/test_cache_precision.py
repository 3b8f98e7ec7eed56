"""What a cache of few bits costs: distributions of the shipped model on a text, against a bf16 cache and torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trilemma.formats.artifact import load_any
from trilemma.measure.quality.texts import tokenizer_of
from trilemma.runtime.engine import EngineOptions
from trilemma.runtime.native import NativeEngine
from trilemma.runtime.reference import ReferenceEngine, round_int4_mixed

TEXT = Path(__file__).parents[2] / "examples" / "texts" / "children.txt"


@pytest.fixture(scope="module")
def found(hearth_path):
    """(precision, engine) -> log probabilities of one window of 384 tokens."""
    model = load_any(hearth_path)
    tokens = np.asarray(tokenizer_of(model).encode(TEXT.read_text(encoding="utf-8")[:4000]))[:384].astype(np.int32)
    makers = {"native": NativeEngine, "torch": ReferenceEngine}

    def one(precision: str, engine: str) -> torch.Tensor:
        opened = makers[engine](model, EngineOptions(kv_cache=precision, threads=1, max_context=512))
        return torch.log_softmax(torch.from_numpy(opened.logits(tokens)).double(), -1)

    return {key: one(*key) for key in [("bf16", "native"), ("int8", "native"), ("int4", "native"), ("int4", "torch")]}


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize(("precision", "least", "most"), [("int8", 1e-6, 2e-4), ("int4", 1e-3, 0.02)])
def test_the_divergence_from_a_bf16_cache_is_small(found, precision, least, most):
    assert least < divergence(found["bf16", "native"], found[precision, "native"]) < most


def test_int4_is_the_rounding_that_the_reference_does(found):
    """Codes differ only where a value lies on the edge between two; one that differs moves all that follow."""
    apart = divergence(found["int4", "torch"], found["int4", "native"])
    assert apart < 0.3 * divergence(found["bf16", "native"], found["int4", "native"])


@pytest.mark.parametrize("dims", [1, 6, 17, 32, 40, 128])
def test_the_reference_rounds_in_a_basis_of_sums_and_differences(dims, random_generator):
    """What is kept lies within half a code of each coordinate there; a far outlier costs the others little."""
    x = torch.from_numpy(random_generator.standard_normal((5, dims)).astype(np.float32))
    x[:, 0] *= 20
    block = dims & -dims
    basis = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)])
    mixed = torch.einsum("ij,ngj->ngi", basis, x.unflatten(1, (-1, block))).flatten(1)
    kept = torch.einsum("ij,ngj->ngi", basis, round_int4_mixed(x).unflatten(1, (-1, block))).flatten(1)
    code = (mixed.amax(1) - mixed.amin(1)) / 15
    # bf16 scale and minimum: 2^-8 of 15 codes, and of the minimum
    slack = code * 15 / 256 + mixed.abs().amax(1) / 256 + 1e-5
    assert ((kept - mixed).abs() <= (0.5 * code + slack)[:, None]).all()
