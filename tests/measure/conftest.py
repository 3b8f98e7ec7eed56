"""A fake engine whose logits and times the test decides."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from trilemma.data.windows import TokenSet
from trilemma.model.config import Attention, LayerSpec
from trilemma.runtime.engine import EngineMemory, Generation


class FakeConfig:
    def __init__(self, vocab_size, max_context):
        self.vocab_size, self.max_context = vocab_size, max_context
        attention = Attention(heads=2, kv_heads=1, head_dim=3, rope=None, scale=1.0)
        self.layers = (LayerSpec(attention=attention, ffn=None),)


class FakeEngine:
    """Logits come from `function(tokens) -> (n, vocab)`; times from `times(call number) -> seconds of each token`."""

    name, isa, threads, kv_cache = "fake", "none", 2, "bf16"

    def __init__(self, function=None, *, vocab=11, context=64, times=None, answers=None):
        self.config, self.max_context = FakeConfig(vocab, context), context
        self.function, self.times, self.answers = function, times, answers
        self.calls = []

    def memory(self):
        return EngineMemory(weights_bytes=1000, kv_bytes=640, scratch_bytes=7)

    def logits(self, tokens, *, last_only=False):
        return np.asarray(self.function(np.asarray(tokens)), np.float32)

    def generate(self, prompt, settings, on_token=None):
        self.calls.append((list(prompt), settings))
        tokens = self.answers(prompt, settings) if self.answers else [1] * settings.max_tokens
        times = self.times(len(self.calls) - 1) if self.times else [0.1 * (k + 1) for k in range(len(tokens))]
        return Generation(tokens, "length", len(prompt), list(times))

    def close(self):
        pass


@pytest.fixture
def fake_engine() -> Callable[..., FakeEngine]:
    return FakeEngine


@pytest.fixture
def make_token_set() -> Callable[..., TokenSet]:
    def make(rng, documents=7, windows=3, context=9, vocab=11):
        owners, found = [], []
        for document in range(documents):
            for _ in range(windows):
                found.append(rng.integers(0, vocab, int(rng.integers(2, context + 1))).astype(np.int32))
                owners.append(document)
        sizes = np.asarray([3.5 * (len(window) - 1) for window in found])
        names = tuple(f"d{index}" for index in range(documents))
        return TokenSet(tuple(found), np.asarray(owners), sizes, context, names, ("x",) * documents)

    return make
