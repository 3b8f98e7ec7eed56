"""Every family in the native engine: the logits of the torch engine, from a checkpoint that transformers wrote."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

from family_cases import CASES
from trilemma.model.checkpoint import read_checkpoint
from trilemma.model.config import is_low_rank, with_low_rank
from trilemma.model.model import Model
from trilemma.runtime import ENGINES, EngineOptions
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.schemes import scheme_to_recipe

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 3e-4  # largest difference of f32 logits; they are of the order of 10


@pytest.mark.parametrize("case", CASES)
def test_native_equals_torch(case, save_hf, random_generator):
    kind, options = CASES[case]
    check_equal(read_checkpoint(save_hf(kind, **options)[1]), random_generator)


@pytest.mark.parametrize("case", ["gemma3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe every second layer, window"])
@pytest.mark.parametrize("rank", [1, 16, 35])
def test_native_equals_torch_with_low_rank_pairs(case, rank, save_hf, random_generator):
    kind, options = CASES[case]
    model = read_checkpoint(save_hf(kind, **options)[1])
    paired = model.with_config(with_low_rank(model.config, rank))
    shapes = {name: shape for name, shape in paired.config.tensor_shapes().items() if is_low_rank(name)}
    assert shapes
    pairs = {
        name: (random_generator.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        for name, shape in shapes.items()
    }
    check_equal(paired.with_tensors(pairs), random_generator)


def check_equal(model: Model, random_generator: np.random.Generator) -> None:
    tokens = random_generator.integers(0, model.config.vocab_size, 41).astype(np.int32)
    found = []
    for name in ("torch", "native"):
        engine = ENGINES.get(name)(model, EngineOptions(kv_cache="f32", threads=1))
        found.append(engine.logits(tokens))
        engine.close()
    assert found[0].std() > 0.5
    assert np.abs(found[1] - found[0]).max() < TOLERANCE


def _divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean KL divergence (nats) of the next token's distribution."""
    first, second = (
        x.astype(np.float64) - logsumexp(x.astype(np.float64), axis=-1)[:, None] for x in (expected, found)
    )
    return float((np.exp(first) * (first - second)).sum(-1).mean())


@pytest.mark.parametrize("case", ["gemma3", "phi3 long rope", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"])
def test_native_equals_torch_in_four_bits(case, save_hf, random_generator):
    kind, options = CASES[case]
    model = read_checkpoint(save_hf(kind, **options)[1])
    small = apply_recipe(model, scheme_to_recipe("W4A8-g32"), Build())
    tokens = random_generator.integers(0, model.config.vocab_size, 41).astype(np.int32)
    chosen = EngineOptions(kv_cache="f32", threads=1)
    whole, torch, native = (
        ENGINES.get(name)(each, chosen).logits(tokens)
        for name, each in (("torch", model), ("torch", small), ("native", small))
    )
    # roundings at the border of two codes fall differently now and then; they must be nothing beside the format's error
    assert _divergence(torch, native) < 0.05 * _divergence(whole, torch)
