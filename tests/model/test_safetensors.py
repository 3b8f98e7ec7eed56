"""The file format against the safetensors package, and every way a header can lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trilemma.core.errors import CheckpointError
from trilemma.model.safetensors import Planned, SafetensorsFile, write_safetensors


def _raw(path: Path, header: Any, data: bytes = b"\0" * 64) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _tensor(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_package_writes(tmp_path, random_generator):
    tensors = {
        f"t{i}": random_generator.standard_normal(tuple(random_generator.integers(0, 9, i % 4))).astype(dtype)
        for i, dtype in enumerate([np.float32, np.float16, np.float64] * 4)
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    for name, values in tensors.items():
        np.testing.assert_array_equal(file.read(name), values)
        assert file.read(name).dtype == values.dtype


def test_the_package_reads_what_we_write(tmp_path, random_generator):
    tensors = {
        f"t{i}": random_generator.standard_normal((i + 1, 2 * i + 3)).astype([np.float32, np.float16][i % 2])
        for i in range(9)
    }
    dtypes = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
    planned = [Planned(name, dtypes[v.dtype], v.shape, lambda v=v: v) for name, v in tensors.items()]
    path = tmp_path / "b.safetensors"
    write_safetensors(path, planned, {"format": "pt"})
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(back[name], values)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 64 == 56  # data begins aligned


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{oops", "not valid JSON"),
        (b"[1, 2]", "no JSON object"),
        (b'{"a": {}, "a": {}}', "occurs twice"),
        ({"a": {"dtype": "F32"}}, "tensor 'a' lacks"),
        ({"a": _tensor(dtype="F33")}, "tensor 'a' has the unknown dtype 'F33'"),
        ({"a": _tensor(shape=(-4,))}, "tensor 'a' has the shape"),
        ({"a": _tensor(offsets=(16, 0))}, "tensor 'a' has bad data_offsets"),
        ({"a": _tensor(offsets=(0, 12))}, "tensor 'a' of shape .* does not fit its 12 bytes"),
        ({"a": _tensor(shape=(1 << 62, 4), offsets=(0, 16))}, "does not fit"),
        ({"a": _tensor(shape=(20,), offsets=(0, 80))}, "truncated: tensor 'a' ends at byte"),
        ({"a": _tensor(), "b": _tensor(offsets=(8, 24))}, "'a' and 'b' overlap"),
    ],
)
def test_headers_that_lie(tmp_path, header, words):
    path = _raw(tmp_path / "bad.safetensors", header)
    with pytest.raises(CheckpointError, match=words) as caught:
        SafetensorsFile(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too few"),
        (b"\xff" * 8, "no safetensors file"),
        ((10_000).to_bytes(8, "little") + b"{}", "ends inside its header"),
        (b"PK\x03\x04" + b"\0" * 100, "no safetensors file|ends inside"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        SafetensorsFile(path)


def test_a_file_that_shrinks_after_opening(tmp_path):
    path = _raw(tmp_path / "a.safetensors", {"a": _tensor(shape=(16,), offsets=(0, 64))})
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="ends inside tensor 'a'"):
        file.read("a")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tensor 'a'.*No such file"):
        file.read("a")


def test_weights_of_other_dtypes_are_refused(tmp_path):
    path = _raw(tmp_path / "a.safetensors", {"a": _tensor(dtype="F8_E4M3", shape=(16,))})
    with pytest.raises(CheckpointError, match=r"'a'.*F8_E4M3.*F32, F16 or BF16"):
        SafetensorsFile(path).read("a")


def test_random_damage_never_escapes(tmp_path, random_generator):
    """Flipped header bytes give our error or a readable file, nothing else."""
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones((3, 5), np.float32), "b": np.ones(7, np.float16)}, path)
    original = bytearray(path.read_bytes())
    for _ in range(300):
        damaged = bytearray(original)
        for _ in range(int(random_generator.integers(1, 4))):
            damaged[int(random_generator.integers(0, 160))] = int(random_generator.integers(256))
        path.write_bytes(damaged[: int(random_generator.integers(0, len(damaged) + 1))])
        try:
            file = SafetensorsFile(path)
            for name in file.entries:
                file.read(name)
        except CheckpointError:
            pass
