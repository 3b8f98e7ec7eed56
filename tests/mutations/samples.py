"""Small valid models to damage, made anew: GGUF files of every type that is read, checkpoints, artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from trilemma.core.recipe import Recipe
from trilemma.export.gguf import export_gguf
from trilemma.formats.artifact import load_any, write_artifact
from trilemma.formats.random_weights import with_random_weights
from trilemma.model.model import Activation, Model
from trilemma.model.write import write_checkpoint
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.technique import Build

HEARTH = Path(__file__).resolve().parents[2] / "examples" / "models" / "hearth-7m"
FORMATS = ("f32", "f16", "bf16", "int8-g32", "int4-g32", "int4-g32-asym", "int5-g32", "int5-g32-asym", "int4-g32-k",
           "int5-g32-k", "int6-g16-k", "int2-g16-k", "int3-g16-k", "nl4-g32")  # fmt: skip
SMALL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "vocab_size": 97,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = {**SMALL, "hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 1}
QWEN = {**SMALL, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}


def random_model(folder: Path, config: dict[str, object], storage: str) -> Model:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run: Activation = "f32" if storage in ("f32", "f16", "bf16") else "int8-g32"
    return with_random_weights(load_any(folder), lambda _: storage, activation_of=lambda _: run, seed=1)


def make_ggufs(folder: Path) -> list[Path]:
    """One file a storage type, and the shipped model with its vocabulary."""
    found = []
    for storage in FORMATS:
        config = WIDE if storage.endswith("-k") else QWEN if storage == "int8-g32" else SMALL
        found.append(folder / f"{storage}.gguf")
        export_gguf(random_model(folder / f"{storage}.shape", config, storage), found[-1])
    found.append(folder / "hearth.gguf")
    export_gguf(apply_recipe(load_any(HEARTH), scheme_to_recipe("W4A8-g32"), Build()), found[-1])
    return found


def make_checkpoints(folder: Path) -> list[Path]:
    """Folders of config.json and model.safetensors."""
    found = []
    for name, config, storage in (("bf16", SMALL, "bf16"), ("f16", QWEN, "f16"), ("f32", SMALL, "f32")):
        found.append(folder / f"{name}.checkpoint")
        write_checkpoint(random_model(folder / f"{name}.shape2", config, storage), found[-1])
    return found


def make_artifacts(folder: Path) -> list[Path]:
    """Artifact folders, with layouts of all versions."""
    found = []
    for storage in ("bf16", "int8-channel", "int4-g32", "int5-g32-asym", "int6-g16-k", "int3-g16", "int2-g16-k"):
        found.append(folder / f"{storage}.artifact")
        model = random_model(folder / f"{storage}.shape3", WIDE if storage.endswith("-k") else SMALL, storage)
        write_artifact(model, found[-1], Recipe(name=storage, steps=()))
    return found


MAKERS: dict[str, Callable[[Path], list[Path]]] = {
    "gguf": make_ggufs, "safetensors": make_checkpoints, "artifact": make_artifacts,
}  # fmt: skip
