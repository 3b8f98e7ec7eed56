"""Folders whole and damaged, hub ids, bare configs, and writing back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trilemma.core.errors import CheckpointError, MissingExtraError, OutputError, UnsupportedModelError
from trilemma.model.checkpoint import model_hash, read_checkpoint, write_checkpoint
from trilemma.model.plain import PlainMatrix

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(save_hf, sizes) -> Path:
    """A small Llama in bf16, one file."""
    return save_hf("Llama", dtype=torch.bfloat16, **sizes)[1]


@pytest.fixture
def sharded(save_hf, sizes) -> Path:
    return save_hf("Llama", dtype=torch.bfloat16, shard="20KB", **sizes)[1]


def _change(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    found = {**load_file(path), **tensors}
    save_file({name: value for name, value in found.items() if value is not None}, path)


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_values_are_those_of_the_safetensors_package(folder):
    model = read_checkpoint(folder)
    stored = load_file(folder / "model.safetensors")
    matrix = model.stored("layers.1.ffn.down.weight")
    assert isinstance(matrix, PlainMatrix)
    assert (matrix.dtype, model.format_of("layers.1.ffn.down.weight")) == ("bf16", "bf16")
    expected = stored["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(matrix.bits, expected.view(torch.uint16).numpy())
    np.testing.assert_array_equal(model.tensor("layers.1.ffn.down.weight"), expected.float().numpy())
    norm = model.stored("layers.0.ffn_norm.weight")
    assert isinstance(norm, np.ndarray)
    np.testing.assert_array_equal(norm, stored["model.layers.0.post_attention_layernorm.weight"].float().numpy())


def test_f16_and_f32(save_hf, sizes):
    for dtype, name in ((torch.float16, "f16"), (torch.float32, "f32")):
        theirs, path = save_hf("Llama", dtype=dtype, **sizes)
        model = read_checkpoint(path)
        assert model.format_of("head.weight") == name
        np.testing.assert_array_equal(model.tensor("head.weight"), theirs.lm_head.weight.detach().float().numpy())


def test_opening_reads_no_tensor(folder, monkeypatch):
    from trilemma.model.safetensors import SafetensorsFile

    def fail(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsFile, "read", fail)
    model = read_checkpoint(folder)
    assert model.format_of("embedding.weight") == "bf16"
    assert model.path == folder


# --- damaged


def test_missing_tensor(folder):
    _change(folder, **{"model.layers.2.mlp.up_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"):
        read_checkpoint(folder)


def test_missing_head_says_how_to_tie(folder):
    _change(folder, **{"lm_head.weight": None})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        read_checkpoint(folder)
    _edit_config(folder, tie_word_embeddings=True)
    assert read_checkpoint(folder).config.tied


def test_wrong_shape(folder):
    _change(folder, **{"model.norm.weight": torch.ones(41)})
    with pytest.raises(
        CheckpointError, match=r"'model\.norm\.weight' in .*model\.safetensors has shape \(41,\).*\(40,\)"
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(folder, dtype, bad):
    values = torch.zeros(76, 40, dtype=dtype)
    values[71, 13] = bad
    _change(folder, **{"model.layers.0.mlp.up_proj.weight": values})
    model = read_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' in .* at \(71, 13\)"):
        model.tensor("layers.0.ffn.up.weight")


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated: tensor '"):
        read_checkpoint(folder)


def test_missing_shard(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"Shard {gone.name} is missing"):
        read_checkpoint(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=f"Shard {gone.name} is missing"):
        read_checkpoint(sharded)


def test_shards_without_index(sharded):
    expected = model_hash(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    assert model_hash(sharded) == expected


def test_index_that_lies(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(key for key, shard in index["weight_map"].items() if shard == shards[0])
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: shards[1]}}))
    with pytest.raises(CheckpointError, match=f"'{name}' is not in .*{shards[1]}"):
        read_checkpoint(sharded)
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="file of the same folder"):
        read_checkpoint(sharded)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="no 'weight_map'"):
        read_checkpoint(sharded)


def test_unknown_tensors_are_listed_and_harmless_ones_are_not(folder):
    _change(folder, extra=torch.ones(3), **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)})
    assert read_checkpoint(folder).source.unknown == ("extra",)
    _edit_config(folder, tie_word_embeddings=True)
    model = read_checkpoint(folder)
    assert model.source.unknown == ("extra",)  # a tied model's copy of the head carries nothing
    assert "head.weight" not in model.names()


# --- other things than checkpoints


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_the_way_out(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    for path in (folder, folder / name):
        with pytest.raises(CheckpointError, match=r"pickle(.|\n)*safetensors\.torch(.|\n)*weights_only=True"):
            read_checkpoint(path)


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", ["{oops", "[]", ""])
def test_broken_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_checkpoint(folder)


def test_unknown_architecture(folder):
    _edit_config(folder, model_type="rwkv")
    with pytest.raises(UnsupportedModelError, match=r"'rwkv'.*llama, mistral.*qwen2"):
        read_checkpoint(folder)


def test_weights_lost_beside_a_tokenizer_are_an_error_and_not_random(folder):
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"give the path of config\.json itself for random weights"):
        read_checkpoint(folder)


def test_a_typo_says_both(tmp_path):
    for name in (str(tmp_path / "modle"), "no-such-folder", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"no folder '.*', and it is no hub id"):
            read_checkpoint(name)


def test_a_typo_in_a_folder_that_exists_is_not_looked_up_on_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    right = folder.relative_to(folder.parent.parent)
    with pytest.raises(CheckpointError, match=f"Did you mean '{right}'"):
        read_checkpoint(f"{right}0")


def test_end_tokens_of_the_generation_config(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert read_checkpoint(folder).config.eos_token_ids == (3, 5)
    (folder / "generation_config.json").write_text("{}")
    assert read_checkpoint(folder).config.eos_token_ids == (2,)


# --- hub


def test_hub_id(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read_checkpoint("some-org/model-1.5B").config.dim == 40
    assert asked["repo"] == "some-org/model-1.5B"
    assert not any(pattern.endswith((".py", ".bin", ".pt")) or pattern == "*" for pattern in asked["patterns"])


def test_hub_failure_is_one_clear_error(monkeypatch):
    import huggingface_hub

    def download(*_: Any, **__: Any) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"no folder 'org/name', and fetching .* failed: Name or service"):
        read_checkpoint("org/name")


def test_hub_extra_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"trilemma\[hub\]"):
        read_checkpoint("org/name")


# --- random weights


def test_bare_config_gives_random_weights(shapes_path, tmp_path):
    model = read_checkpoint(shapes_path / "SmolLM2-135M" / "config.json")
    assert model.source.random is True
    assert read_checkpoint(shapes_path / "SmolLM2-135M").source.random is True
    name = "layers.0.attention.k.weight"
    values = model.tensor(name)
    assert model.format_of(name) == "bf16"
    assert abs(values.mean()) < 3e-4
    assert 0.0195 < values.std() < 0.0205
    np.testing.assert_array_equal(model.tensor("layers.3.ffn_norm.weight"), 1)
    again = read_checkpoint(shapes_path / "SmolLM2-135M" / "config.json")
    np.testing.assert_array_equal(again.tensor(name), values)
    other = read_checkpoint(shapes_path / "SmolLM2-135M" / "config.json", seed=1)
    assert (other.tensor(name) != values).mean() > 0.9
    assert model_hash(again) == model_hash(model) != model_hash(other)


@pytest.mark.parametrize(("key", "value", "dtype"), [("torch_dtype", "float32", "f32"), ("dtype", "float16", "f16")])
def test_declared_dtype(folder, key, value, dtype, tmp_path):
    raw = json.loads((folder / "config.json").read_text())
    raw = {k: v for k, v in raw.items() if k not in ("dtype", "torch_dtype")} | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_checkpoint(tmp_path / "config.json").format_of("embedding.weight") == dtype


# --- writing


def test_write_and_read_back_bit_for_bit(folder, tmp_path):
    model = read_checkpoint(folder)
    again = read_checkpoint(write_checkpoint(model, tmp_path / "deep" / "out"))
    assert again.config == model.config
    for name in model:
        assert again.format_of(name) == "bf16"
        np.testing.assert_array_equal(again.tensor(name), model.tensor(name))
    assert not [path for path in (tmp_path / "deep").iterdir() if path.name != "out"]


def test_write_in_another_dtype_with_a_replaced_tensor(folder, tmp_path):
    name = "layers.1.attention.o.weight"
    model = read_checkpoint(folder)
    changed = model.with_tensors({name: model.tensor(name) * np.float32(1.2345)})
    kept = read_checkpoint(write_checkpoint(changed, tmp_path / "kept"))
    assert (kept.format_of(name), kept.format_of("embedding.weight")) == ("f32", "bf16")
    np.testing.assert_array_equal(kept.tensor(name), changed.tensor(name))
    half = read_checkpoint(write_checkpoint(changed, tmp_path / "half", dtype="f16"))
    assert half.format_of(name) == "f16"
    np.testing.assert_allclose(half.tensor(name), changed.tensor(name), rtol=1e-3, atol=1e-6)
    assert model_hash(changed) != model_hash(model)


def test_tokenizer_files_travel(hearth_path, tmp_path):
    out = write_checkpoint(read_checkpoint(hearth_path), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (hearth_path / name).read_bytes()


def test_an_occupied_folder_is_left_alone(folder, tmp_path):
    model = read_checkpoint(folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="not empty"):
        write_checkpoint(model, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    write_checkpoint(model, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert read_checkpoint(out).config == model.config


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    import errno

    from trilemma.model import write

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "write_safetensors", full)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="the disk is full"):
        write_checkpoint(read_checkpoint(folder), tmp_path / "there" / "out")
    assert list((tmp_path / "there").iterdir()) == []


def test_hash_sees_every_byte(folder):
    before = model_hash(folder)
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    assert model_hash(copy) == before
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert model_hash(copy) != before
    _edit_config(folder, rms_norm_eps=1e-4)
    assert model_hash(folder) != before
