"""What most tests of techniques need: one thread, random windows of tokens, logits by layers and by engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trilemma.model.decoder import Decoder
from trilemma.model.model import Model
from trilemma.runtime import EngineOptions, open_engine

Tokens = NDArray[np.int32]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models of this size only lose by waking a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def windows(random_generator: np.random.Generator) -> Callable[..., Tokens]:
    """`windows(model, count=8, length=32)`: fresh random tokens at every call, (count, length)."""

    def make(model: Model, count: int = 8, length: int = 32) -> Tokens:
        return random_generator.integers(0, model.config.vocab_size, (count, length)).astype(np.int32)

    return make


@pytest.fixture
def tokens(random_generator: np.random.Generator) -> Tokens:
    """Eight windows of 32 tokens of `tiny_model`'s vocabulary."""
    return random_generator.integers(0, 97, (8, 32)).astype(np.int32)


def logits_of(model: Model, tokens: Tokens) -> torch.Tensor:
    with torch.no_grad():
        return Decoder.from_model(model)(torch.from_numpy(tokens.astype(np.int64)))


@pytest.fixture(scope="session")
def logits() -> Callable[[Model, Tokens], torch.Tensor]:
    """`logits(model, tokens)`: of the differentiable decoder, (windows, length, vocab)."""
    return logits_of


@pytest.fixture(scope="session")
def engine_logits() -> Callable[..., NDArray[np.float32]]:
    """`engine_logits(model, tokens, runtime="native")`: of an engine with an f32 cache, (length, vocab)."""

    def run(model: Model, tokens: Tokens, runtime: str = "native") -> NDArray[np.float32]:
        engine = open_engine(model, runtime=runtime, options=EngineOptions(threads=1, kv_cache="f32"))
        try:
            return engine.logits(tokens)
        finally:
            engine.close()

    return run
