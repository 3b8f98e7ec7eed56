"""A full disk: a clear error, exit code 2, nothing half-written, and what was there is still there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 9 MB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"can not mount a small file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_compress_on_a_full_disk_leaves_the_old_artifact(small_disk, hearth_path, trilemma):
    output = small_disk / "artifact"
    assert trilemma("compress", hearth_path, "-o", output, "--scheme", "W4A8-g32").returncode == 0
    before = contents(small_disk)
    done = trilemma("compress", hearth_path, "-o", output, "--scheme", "W8A8-g32", "--force")
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "space" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(small_disk) == before


def test_export_on_a_full_disk_leaves_nothing(small_disk, hearth_path, trilemma):
    done = trilemma("export", hearth_path, "-o", small_disk / "model.gguf", "--to", "gguf")
    assert done.returncode == 2
    assert "space" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(small_disk) == {}
