"""Fixtures that every room's tests share: the shipped model, the material beside the checkout, small random models."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trilemma.model.config import Attention, DecoderConfig, Dense, Experts, LayerSpec, Rope
from trilemma.model.model import Model

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def hearth_path() -> Path:
    """The shipped model: real weights, always there."""
    return REPOSITORY / "examples" / "models" / "hearth-7m"


@pytest.fixture(scope="session")
def texts_path() -> Path:
    """150 documents that the shipped model was not trained on."""
    return REPOSITORY / "examples" / "texts" / "children.txt"


@pytest.fixture(scope="session")
def shapes_path() -> Path:
    """Folders of bare config.json files of published models."""
    return REPOSITORY / "examples" / "shapes"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Models and texts that are too large to ship; tests that use them carry the marker `shared`."""
    folder = Path(os.environ.get("TRILEMMA_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"needs the shared models and texts: no '{folder}' (set TRILEMMA_SHARED to where they are)")
    return folder


class RandomTensors:
    """A source of small random f32 tensors of the right shapes, the same ones at every reading."""

    def __init__(self, config: DecoderConfig, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self._tensors: dict[str, NDArray[np.float32]] = {}
        for name, shape in config.tensor_shapes().items():
            values = generator.standard_normal(shape).astype(np.float32)
            norm = name.endswith("norm.weight")
            self._tensors[name] = 1 + 0.1 * values if norm else values / np.sqrt(np.float32(shape[-1]))

    def stored_dtype(self, name: str) -> str:
        return "f32"

    def read(self, name: str) -> NDArray[np.float32]:
        return self._tensors[name]


def tiny_config(
    *, dim: int = 48, layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, ffn: int = 80,
    vocab: int = 97, context: int = 64, tied: bool = True, qkv_bias: bool = False, qk_norm: bool = False,
    theta: float = 10000.0,
) -> DecoderConfig:  # fmt: skip
    """A small decoder whose sizes divide nothing in particular."""
    frequencies = tuple(float(theta ** (-2 * i / head_dim)) for i in range(head_dim // 2))
    rope = Rope(theta=theta, inverse_frequencies=frequencies)
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        scale=head_dim**-0.5,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )
    layer = LayerSpec(attention=attention, ffn=Dense(hidden=ffn))
    return DecoderConfig(
        family="qwen3" if qk_norm else "qwen2" if qkv_bias else "llama", dim=dim, vocab_size=vocab, max_context=context,
        layers=(layer,) * layers, norm_eps=1e-5, tied=tied,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Model]:
    """Makes a small random model: `tiny_model(seed=3, dim=48, heads=4, ...)`; see `tiny_config` for the rest."""

    def make(seed: int = 0, **sizes: int | float | bool) -> Model:
        config = tiny_config(**sizes)  # type: ignore[arg-type]
        return Model(config, RandomTensors(config, seed))

    return make


@pytest.fixture(scope="session")
def random_model() -> Callable[[DecoderConfig, int], Model]:
    """`random_model(config, seed)`: random f32 weights for any config."""
    return lambda config, seed=0: Model(config, RandomTensors(config, seed))


@pytest.fixture(scope="session")
def experts_config() -> Callable[..., DecoderConfig]:
    """`experts_config(shared_hidden=20, ...)`: `tiny_config` with two layers of Experts, which the options are of."""

    def make(**options: int | str | bool) -> DecoderConfig:
        config = tiny_config(context=64)
        experts = Experts(**{"count": 5, "active": 2, "hidden": 27, **options})  # type: ignore[arg-type]
        layers = tuple(layer.model_copy(update={"ffn": experts}) for layer in config.layers)
        return config.model_copy(update={"layers": layers})

    return make


@pytest.fixture
def random_generator(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh numbers at every run; the seed is printed when a test fails."""
    seed = int(os.environ.get("TRILEMMA_TEST_SEED", np.random.SeedSequence().entropy % 2**32))  # type: ignore[operator]
    print(f"TRILEMMA_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def save_hf(tmp_path: Path, random_generator: np.random.Generator) -> Callable[..., tuple[Any, Path]]:
    """`save_hf("Llama", **options)` -> (the transformers model, its folder); every parameter is random."""

    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    def save(kind: str, *, dtype: Any = torch.float32, shard: str = "5GB", **options: Any) -> tuple[Any, Path]:
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
