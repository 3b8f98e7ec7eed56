"""The reference loop: what marks a run noisy."""

from __future__ import annotations

import os

import pytest

from trilemma.measure.timing.noise import ReferenceLoop


def stat_file(path, busy_ticks, idle_ticks):
    rows = [f"cpu{core} {busy_ticks} 0 0 {idle_ticks} 0 0 0 0 0 0" for core in os.sched_getaffinity(0)]
    path.write_text("cpu 0 0 0 0 0 0 0 0 0 0\n" + "\n".join(rows) + "\nctxt 1\n", encoding="ascii")
    return path


def test_a_machine_that_moved_is_noisy(tmp_path):
    with ReferenceLoop(2, stat=tmp_path / "absent") as loop:
        assert loop.probe() > 0
        assert not loop.noisy
        loop.times_s[:] = [1.0, 1.04, 1.0]
        assert loop.drift == pytest.approx(0.04)
        assert not loop.noisy
        loop.times_s[:] = [1.0, 1.02, 1.08]
        assert loop.noisy
        assert "8%" in loop.reason
        assert loop.foreign_share is None


def test_other_work_on_our_cores_is_noisy(tmp_path):
    cores = len(os.sched_getaffinity(0))
    with ReferenceLoop(1, stat=stat_file(tmp_path / "stat", 0, 0)) as loop:
        loop.times_s[:] = [1.0, 1.0]
        stat_file(tmp_path / "stat", 0, 10_000)
        assert loop.foreign_share == 0
        assert not loop.noisy
        stat_file(tmp_path / "stat", 5_000, 10_000)  # a third of each core
        assert loop.foreign_share == pytest.approx(1 / 3, abs=0.02 + 0.1 / cores)
        assert "other work took 33%" in loop.reason
