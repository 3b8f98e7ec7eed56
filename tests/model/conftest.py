"""Small random models made, initialised and saved by transformers: the oracle of this room."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models of this size only lose by waking a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sizes() -> dict[str, Any]:
    """Sizes that divide nothing in particular, as small as attention allows."""
    return {
        "vocab_size": 113, "hidden_size": 40, "intermediate_size": 76, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
