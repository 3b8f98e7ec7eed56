"""Memory: the engine's account, files on disk, and a fresh process."""

from __future__ import annotations

import pytest

from trilemma.core.errors import EngineError, InputError
from trilemma.measure.memory.held import artifact_bytes, engine_memory, peak_memory
from trilemma.measure.memory.peak_process import peak_resident_bytes


def test_the_engines_own_account(fake_engine):
    found = engine_memory(fake_engine(context=64))
    assert found["weights_bytes"].value == 1000
    assert found["engine_memory_bytes"].value == 1647
    assert found["kv_bytes_per_token"].value == 2 * 3 * 2  # key and value, head_dim 3, bf16
    assert found["engine_memory_bytes"].interval == (1647, 1647)
    assert found["engine_memory_bytes"].conditions["scratch_bytes"] == 7


def test_bytes_on_disk(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "deep" / "b").write_bytes(b"x" * 23)
    assert artifact_bytes(tmp_path).value == 123
    assert artifact_bytes(tmp_path / "a").value == 100
    with pytest.raises(InputError, match="does not exist"):
        artifact_bytes(tmp_path / "c")


def test_high_water_mark_is_read_from_proc_or_rusage(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t 1 kB\n", encoding="ascii")
    assert peak_resident_bytes(status) == 2048 * 1024
    assert peak_resident_bytes(tmp_path / "absent") > 1_000_000
    held = bytearray(60_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_resident_bytes() > 60_000_000


def test_a_fresh_process_is_measured_against_an_empty_one(hearth_path):
    found = peak_memory(hearth_path, prompt_tokens=16, output_tokens=4)
    empty = found.conditions["empty_process_bytes"]
    assert 10e6 < empty < found.value < empty + 120e6
    assert found.value - empty > 13.6e6  # its weights
    assert found.conditions["above_empty_bytes"] == found.value - empty


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(EngineError, match=r"peak memory failed: .*nowhere"):
        peak_memory(tmp_path / "nowhere", prompt_tokens=4, output_tokens=2)
