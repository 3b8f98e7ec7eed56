"""The artifact folder: what goes in comes out, same bytes every time, damage is found, nothing is left half-done."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from trilemma.core.errors import CheckpointError, OutputError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats import FORMATS
from trilemma.formats.artifact import (
    check_output,
    load_any,
    read_artifact,
    read_recipe,
    weights_bytes,
    write_artifact,
)
from trilemma.formats.random_weights import with_random_weights
from trilemma.model.model import LinearRun, RunSettings

RECIPE = Recipe(name="mixed", seed=5, steps=(Step(technique="rtn", settings={"weights": "int4-g32"}),))


@pytest.fixture
def mixed(tiny_model):
    """A model with every format of the table, untied, with biases."""
    names = FORMATS.names()
    model = tiny_model(qkv_bias=True, tied=False, dim=40, head_dim=10, ffn=172, layers=6)
    matrices = [name for name, shape in model.config.tensor_shapes().items() if len(shape) == 2]
    order = {name: index for index, name in enumerate(matrices)}
    made = with_random_weights(model, lambda name: names[order[name] % len(names)], seed=3)
    made = made.with_tensors({}, {"layers.0.attention.o.weight": LinearRun(activation="bf16")})
    return made.with_run(RunSettings(kv_cache="int8"))


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_goes_in_comes_out(mixed, tmp_path):
    assert {mixed.format_of(name) for name in mixed} == set(FORMATS.names())
    write_artifact(mixed, tmp_path / "out", RECIPE)
    opened = read_artifact(tmp_path / "out")
    assert opened.config == mixed.config
    assert opened.run == mixed.run
    for name in mixed:
        np.testing.assert_array_equal(opened.tensor(name), mixed.tensor(name))
        assert opened.format_of(name) == mixed.format_of(name)
        assert opened.linear(name) == mixed.linear(name)
    assert read_recipe(tmp_path / "out") == RECIPE
    assert load_any(tmp_path / "out").path == tmp_path / "out"


def test_the_same_model_gives_the_same_bytes_and_so_does_its_artifact(mixed, tmp_path):
    write_artifact(mixed, tmp_path / "first", RECIPE)
    write_artifact(mixed, tmp_path / "second", RECIPE)
    write_artifact(read_artifact(tmp_path / "first"), tmp_path / "third", RECIPE)
    assert everything(tmp_path / "first") == everything(tmp_path / "second") == everything(tmp_path / "third")


def test_the_weights_are_an_ordinary_aligned_safetensors_file(mixed, tmp_path):
    write_artifact(mixed, tmp_path / "out", RECIPE)
    path = tmp_path / "out" / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 4096 == 0
    header = json.loads(raw[8 : 8 + length])
    assert all(entry["data_offsets"][0] % 64 == 0 for name, entry in header.items() if not name.endswith(".padding"))
    blobs = sum(end - start for start, end in (e["data_offsets"] for n, e in header.items() if "padding" not in n))
    assert blobs == weights_bytes(mixed) == sum(
        stored.nbytes for stored in (mixed.stored(name) for name in mixed)
    )  # fmt: skip
    with safe_open(path, "numpy") as file:
        for name in mixed:
            if mixed.format_of(name) == "f32":
                np.testing.assert_array_equal(file.get_tensor(name), mixed.tensor(name))


def test_tokenizer_and_config_are_copied(hearth_path, tmp_path):
    write_artifact(load_any(hearth_path), tmp_path / "out", Recipe())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (hearth_path / name).read_bytes()
    assert weights_bytes(read_artifact(tmp_path / "out")) < 1.01 * (hearth_path / "model.safetensors").stat().st_size


def test_an_artifact_is_replaced_and_other_folders_are_not(mixed, tiny_model, tmp_path):
    out = tmp_path / "out"
    write_artifact(tiny_model(), out, RECIPE)
    (out / "report.json").write_text("{}")
    with pytest.raises(OutputError, match="--force"):
        check_output(out)
    check_output(out, force=True)
    write_artifact(mixed, out, RECIPE)
    assert read_artifact(out).config == mixed.config
    assert not (out / "report.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(OutputError, match="not empty"):
            check_output(precious, force=force)
    with pytest.raises(OutputError, match="not empty"):
        write_artifact(mixed, precious, RECIPE)
    assert (precious / "thesis.txt").read_text() == "years of work"
    with pytest.raises(OutputError, match="is a file"):
        check_output(precious / "thesis.txt", force=True)


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_everything_as_it_was(existing, mixed, tiny_model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if existing:
        write_artifact(tiny_model(), out, RECIPE)
    before = everything(out) if existing else None

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_artifact(mixed, out, RECIPE)
    assert (everything(out) if existing else None) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])


def test_an_error_in_the_middle_leaves_nothing(mixed, tmp_path):
    class Breaks:
        def stored_dtype(self, name):
            return mixed.source.stored_dtype(name)

        def read(self, name):
            if name == "layers.1.ffn.up.weight":
                raise CheckpointError("gone")
            return mixed.source.read(name)

    broken = mixed.with_config(mixed.config)
    broken.source = Breaks()
    with pytest.raises(CheckpointError, match="gone"):
        write_artifact(broken, tmp_path / "out", RECIPE)
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_behind_is_no_hindrance(mixed, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_bytes(b"half")
    write_artifact(mixed, tmp_path / "out", RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_refused(share, mixed, tmp_path):
    write_artifact(mixed, tmp_path / "out", RECIPE)
    path = tmp_path / "out" / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CheckpointError):
        read_artifact(tmp_path / "out")


def test_a_flipped_bit_is_found_when_its_tensor_is_read(mixed, tmp_path, random_generator):
    write_artifact(mixed, tmp_path / "out", RECIPE)
    path = tmp_path / "out" / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    parts = (".codes", ".scales", ".minima", ".sub_scales", ".sub_minima")
    for blob in (name for name in header if not name.endswith(".padding") and name != "__metadata__"):
        first, last = header[blob]["data_offsets"]
        raw = bytearray(whole)
        raw[start + int(random_generator.integers(first, last))] ^= 1 << int(random_generator.integers(8))
        path.write_bytes(raw)
        name = blob.rpartition(".")[0] if blob.endswith(parts) else blob
        with pytest.raises(CheckpointError, match="checksum"):
            read_artifact(tmp_path / "out").tensor(name)


def mutate(record: dict, how: str) -> None:
    tensor = record["tensors"]["layers.0.ffn.up.weight"]
    if how == "version":
        record["schema_version"] = 99
    elif how == "format":
        tensor["format"] = "int3-g7"
    elif how == "layout":
        tensor["layout"] = "panel99.v1"
    elif how == "shape":
        tensor["shape"][0] += 16
    elif how == "missing":
        del record["tensors"]["layers.0.ffn.up.weight"]
    elif how == "unknown key":
        record["surprise"] = 1


@pytest.mark.parametrize("how", ["version", "format", "layout", "shape", "missing", "unknown key"])
def test_a_changed_record_is_refused(how, mixed, tmp_path):
    write_artifact(mixed, tmp_path / "out", RECIPE)
    path = tmp_path / "out" / "trilemma.json"
    record = json.loads(path.read_text())
    mutate(record, how)
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError):
        read_artifact(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\u0000"])
def test_a_record_that_is_no_record_is_refused(text, mixed, tmp_path):
    write_artifact(mixed, tmp_path / "out", RECIPE)
    (tmp_path / "out" / "trilemma.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_artifact(tmp_path / "out")


def test_missing_weights_are_refused(mixed, tmp_path):
    write_artifact(mixed, tmp_path / "out", RECIPE)
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_artifact(tmp_path / "out")


def test_a_bare_config_opens_with_random_weights_in_any_format(shapes_path):
    config = next(path for path in sorted(shapes_path.iterdir()) if path.is_dir()) / "config.json"
    model = with_random_weights(load_any(config), lambda name: "int8-g32" if "embed" in name else "int4-g64")
    name = "layers.0.attention.k.weight"
    assert model.stored(name).format == model.format_of(name) == "int4-g64"
    assert model.linear(name).activation == "int8-g32"
    assert model.tensor(name).shape == model.config.tensor_shapes()[name]
