"""Bad input through the command line: one clear line, exit code 2, and the output untouched."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

ERROR = 2


@pytest.fixture
def checkpoint(hearth_path, tmp_path):
    """A copy of the shipped model to damage."""
    return Path(shutil.copytree(hearth_path, tmp_path / "model"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(values)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def read_header(path: Path) -> tuple[dict, int]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def write_shards(folder: Path) -> None:
    """Cut model.safetensors in two shards with an index, as large models come."""
    source = folder / "model.safetensors"
    header, start = read_header(source)
    data = source.read_bytes()[start:]
    names = [name for name in header if name != "__metadata__"]
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        entries, blobs, offset = {}, [], 0
        for name in part:
            low, high = header[name]["data_offsets"]
            entries[name] = {**header[name], "data_offsets": [offset, offset + high - low]}
            blobs.append(data[low:high])
            offset += high - low
            index[name] = shard
        text = json.dumps(entries).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    source.unlink()


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_shard(folder: Path) -> None:
    write_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncate_a_shard(folder: Path) -> None:
    write_shards(folder)
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def put_nan(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, start = read_header(path)
    name = "model.layers.3.mlp.down_proj.weight"
    data = bytearray(path.read_bytes())
    at = start + header[name]["data_offsets"][0] + 2 * 777
    data[at : at + 2] = np.array([0x7FC0], np.uint16).tobytes()
    path.write_bytes(bytes(data))


def make_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def break_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


DAMAGES = {
    "truncated": (truncate, ["truncated"]),
    "missing shard": (lose_a_shard, ["model-00002-of-00002"]),
    "truncated shard": (truncate_a_shard, ["model-00001-of-00002"]),
    "wrong shape": (lambda folder: change_config(folder, intermediate_size=700), ["shape", "700"]),
    "missing layers": (lambda folder: change_config(folder, num_hidden_layers=7), ["layers.6"]),
    "nan": (put_nan, ["down_proj", "NaN"]),
    "unknown architecture": (lambda folder: change_config(folder, model_type="griffin"), ["griffin", "llama"]),
    "no architecture": (lambda folder: change_config(folder, model_type=None), ["model_type"]),
    "pickle": (make_pickle, ["pickle", "safetensors.torch"]),
    "broken config": (break_json, ["config.json"]),
}


def assert_refused(done, said: list[str], output: Path) -> None:
    assert done.returncode == ERROR, done.stderr
    assert "\nerror: " in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error: ") :].lower()
    for word in said:
        assert word.lower() in message, message
    assert not output.exists()
    assert list(output.parent.glob(f"{output.name}*")) == [], "something half-written was left"


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused(name, checkpoint, output, trilemma):
    damage, said = DAMAGES[name]
    damage(checkpoint)
    assert_refused(trilemma("compress", checkpoint, "-o", output, "--scheme", "W8A8-g32"), said, output)


def test_shards_are_read(checkpoint, output, trilemma, hearth_path):
    write_shards(checkpoint)
    done = trilemma("compress", checkpoint, "-o", output, "--scheme", "bf16")
    assert done.returncode == 0, done.stderr


def test_no_tokenizer(checkpoint, output, trilemma, texts_path):
    remove_tokenizer(checkpoint)
    assert_refused(trilemma("run", checkpoint, "Once"), ["tokenizer.json"], output)
    done = trilemma("optimize", checkpoint, "-o", output, "--data", texts_path, "--time", "10s")
    assert_refused(done, ["tokenizer.json"], output)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit", "wieghts<=50%"], ["Unknown metric", "weights"]),
        (["--limit", "tpot>=5ms"], ["tpot<=5ms"]),
        (["--limit", "tpot<=5MB"], ["Valid units"]),
        (["--minimize", "speed"], ["Unknown metric", "speed"]),
        (["--time", "soon"], ["soon"]),
        (["--time", "-5s"], ["-5s"]),
        (["--context", "513"], ["513", "512"]),
        (["--data", "nowhere.txt"], ["nowhere.txt"]),
        (["--runtime", "abacus"], ["Unknown", "abacus", "native"]),
    ],
)
def test_wrong_arguments_of_optimize(arguments, said, hearth_path, texts_path, output, trilemma):
    data = [] if "--data" in arguments else ["--data", texts_path]
    done = trilemma("optimize", hearth_path, "-o", output, *data, *arguments)
    assert_refused(done, said, output)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["compress", "{hearth}", "-o", "{out}", "--scheme", "W3A8"], ["W3A8"]),
        (["compress", "{hearth}", "-o", "{out}"], ["--scheme"]),
        (["compress", "{hearth}", "-o", "{out}", "--scheme", "W4A8-g32-gptq"], ["text", "--data"]),
        (["run", "{hearth}", "Once", "--context", "513"], ["513", "512"]),
        (["run", "{hearth}", "Once", "--runtime", "abacus"], ["abacus", "native"]),
        (["run", "{hearth}", "Once", "--chat"], ["chat template"]),
        (["run", "{out}", "Once"], ["{out}"]),
        (["eval", "{hearth}", "--data", "nowhere.txt"], ["nowhere.txt"]),
        (["export", "{hearth}", "-o", "{out}", "--to", "onnxx"], ["onnxx", "gguf"]),
        (["report", "{out}"], ["{out}"]),
        (["check", "{hearth}"], ["report.json"]),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if value[0] in ("compress", "run") else None,
)
def test_wrong_arguments_of_other_commands(command, said, hearth_path, output, trilemma):
    names = {"hearth": str(hearth_path), "out": str(output)}
    done = trilemma(*(part.format(**names) for part in command))
    assert_refused(done, [word.format(**names) for word in said], output)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version: 1\nsteps: [{technique: rtn, settings: {weights: int5}}]", ["int5", "int4-g32"]),
        ("version: 1\nsteps: [{technique: rtn, settings: {wieghts: int4-g32}}]", ["wieghts", "weights"]),
        ("version: 1\nsteps: [{technique: rtm}]", ["rtm", "rtn"]),
        ("version: 9\nsteps: []", ["version 9"]),
        ("version: 1\nstep: []", ["step"]),
    ],
)
def test_a_wrong_recipe(text, said, hearth_path, output, tmp_path, trilemma):
    (tmp_path / "recipe.yaml").write_text(text)
    done = trilemma("compress", hearth_path, "-o", output, "--recipe", tmp_path / "recipe.yaml")
    assert_refused(done, said, output)


def test_a_folder_that_is_not_ours_is_not_replaced(hearth_path, tmp_path, trilemma):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    for arguments in ([], ["--force"]):
        done = trilemma("compress", hearth_path, "-o", tmp_path / "precious", "--scheme", "bf16", *arguments)
        assert done.returncode == ERROR
        assert "not empty" in done.stderr
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_an_artifact_is_replaced_only_by_force(hearth_path, output, trilemma):
    assert trilemma("compress", hearth_path, "-o", output, "--scheme", "bf16").returncode == 0
    before = (output / "model.safetensors").read_bytes()
    done = trilemma("compress", hearth_path, "-o", output, "--scheme", "W8A8-g32")
    assert done.returncode == ERROR
    assert "--force" in done.stderr
    assert (output / "model.safetensors").read_bytes() == before
    assert trilemma("compress", hearth_path, "-o", output, "--scheme", "W8A8-g32", "--force").returncode == 0
    assert len((output / "model.safetensors").read_bytes()) < len(before)


def test_a_damaged_artifact_is_refused(hearth_path, output, trilemma):
    assert trilemma("compress", hearth_path, "-o", output, "--scheme", "W8A8-g32").returncode == 0
    weights = output / "model.safetensors"
    whole = weights.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    weights.write_bytes(bytes(flipped))
    done = trilemma("run", output, "Once")
    assert done.returncode == ERROR, done.stderr
    weights.write_bytes(whole[: len(whole) // 2])
    done = trilemma("run", output, "Once")
    assert done.returncode == ERROR, done.stderr
    assert "Traceback" not in done.stderr
