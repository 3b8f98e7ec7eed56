"""Rope tables against transformers' modeling_rope_utils, with random parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.model.rope import context_with_rope, read_rope, write_rope

pytestmark = pytest.mark.filterwarnings("ignore")


def _random_scaling(kind: str, generator: np.random.Generator) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(generator.uniform(1, 40))}
    if kind == "llama3":
        low = float(generator.uniform(0.5, 2))
        scaling |= {"low_freq_factor": low, "high_freq_factor": low + float(generator.uniform(0.5, 6))}
    if kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = int(generator.integers(64, 9000))
    if kind == "yarn":
        options = {
            "beta_fast": float(generator.uniform(8, 64)), "beta_slow": float(generator.uniform(0.5, 4)),
            "mscale": float(generator.uniform(0.1, 2)), "mscale_all_dim": float(generator.uniform(0.1, 2)),
            "truncate": bool(generator.integers(2)), "attention_factor": float(generator.uniform(0.5, 2)),
        }  # fmt: skip
        scaling |= {key: value for key, value in options.items() if generator.integers(2)}
    return scaling


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn", "dynamic"])
def test_tables_equal_transformers(kind, random_generator):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for _ in range(12):
        head_dim = 2 * int(random_generator.integers(2, 65))
        theta = float(random_generator.choice([10000.0, 500000.0, 1e6]))
        raw: dict[str, Any] = {"rope_theta": theta, "max_position_embeddings": int(random_generator.integers(64, 9000))}
        if kind != "default":
            raw["rope_scaling"] = _random_scaling(kind, random_generator)
        ours = read_rope(raw, head_dim=head_dim, max_context=raw["max_position_embeddings"])
        config = LlamaConfig(head_dim=head_dim, hidden_size=64, num_attention_heads=4, **raw)
        theirs = LlamaRotaryEmbedding(config)
        # theirs is computed in f32, where the smooth steps of llama3 and yarn cancel digits
        tolerance = 1e-4 if kind in ("llama3", "yarn") else 2e-6
        np.testing.assert_allclose(ours.inverse_frequencies, theirs.inv_freq.numpy(), rtol=tolerance)
        assert ours.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-6)
        assert ours.kind == kind


def test_old_and_new_spelling_agree():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    spellings = [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}},
    ]
    ropes = [read_rope(raw, head_dim=16, max_context=512) for raw in spellings]
    assert ropes[0] == ropes[1] == ropes[2]
    assert read_rope(write_rope(ropes[0]), head_dim=16, max_context=512) == ropes[0]


def test_yarn_context_is_the_stretched_one():
    raw = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    rope = read_rope(raw, head_dim=16, max_context=32768)
    assert context_with_rope(rope, 32768) == 131072
    assert context_with_rope(read_rope({}, head_dim=16, max_context=64), 64) == 64


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, UnsupportedModelError, "rope type 'longrope'.*linear"),
        ({"rope_scaling": {"type": "linear"}}, CheckpointError, "needs 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, CheckpointError, "'factor' is 0"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, CheckpointError, "'factor' is 'two'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "wobble": 1}}, UnsupportedModelError, "'wobble'"),
        ({"rope_theta": -1}, CheckpointError, "'rope_theta' is -1"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "'partial_rotary_factor' is 0.5"),
        ({"rope_parameters": {"full_attention": {}}}, UnsupportedModelError, "differ by layer type"),
        ({"rope_scaling": [1]}, CheckpointError, "expected an object"),
    ],
)
def test_refusals_name_key_and_value(raw, error, words):
    with pytest.raises(error, match=words):
        read_rope(raw, head_dim=16, max_context=64)
