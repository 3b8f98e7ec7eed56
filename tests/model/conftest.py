"""Small random models made, initialised and saved by transformers: the oracle of this room."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models of this size only lose by waking a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def save_hf(tmp_path: Path, random_generator: np.random.Generator) -> Callable[..., tuple[Any, Path]]:
    """`save_hf("Llama", **options)` -> (the transformers model, its folder); every parameter is random."""

    def save(kind: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **options: Any) -> tuple[Any, Path]:
        config = getattr(transformers, f"{kind}Config")(**copy.deepcopy(options))  # it changes what it is given
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
        torch.manual_seed(int(random_generator.integers(2**31)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "Gemma" in kind and "norm" in name:
                    parameter.copy_(0.2 * torch.randn_like(parameter))  # stored less 1
                elif ("norm" in name or "ln_" in name) and name.endswith("weight"):
                    parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
                else:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        model = model.to(dtype)
        folder = tmp_path / f"hf-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder, max_shard_size=shard)
        return model, folder

    return save


@pytest.fixture
def sizes() -> dict[str, Any]:
    """Sizes that divide nothing in particular, as small as attention allows."""
    return {
        "vocab_size": 113, "hidden_size": 40, "intermediate_size": 76, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
