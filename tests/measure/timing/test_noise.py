"""The reference loop: what marks a run noisy."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trilemma.measure.timing import noise
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


def test_half_a_core_of_many_is_noisy(tmp_path, monkeypatch):
    monkeypatch.setattr(noise, "usable_cores", lambda: 64)
    with ReferenceLoop(1, stat=stat_file(tmp_path / "stat", 0, 0)) as loop:
        loop.times_s[:] = [1.0, 1.0]
        stat_file(tmp_path / "stat", 400, 99_600)  # 0.4% of the cores, a quarter of one
        assert not loop.noisy
        stat_file(tmp_path / "stat", 1_600, 98_400)  # one core of 64
        assert loop.reason == "other work took 1.0 cores"


def test_many_probes_are_judged_by_their_quiet_levels(tmp_path):
    with ReferenceLoop(1, stat=tmp_path / "absent") as loop:
        loop.times_s[:] = [1.0, 1.01, 1.9, 1.0] * 5  # bursts
        assert not loop.noisy
        loop.times_s[:] = [1.0, 1.01] * 5 + [1.1, 1.9] * 5
        assert loop.drift == pytest.approx(0.1, abs=0.01)
        assert loop.noisy


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_engine_in_a_child_process_is_ours():
    busy = "import time; began = time.process_time()\nwhile time.process_time() < began + 0.2: pass\nprint(1); input()"
    before = noise._children_s()
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline()
        alive = noise._children_s()
        child.communicate(b"\n")
    assert alive - before >= 0.19
    assert noise._children_s() >= alive - 1e-6  # sums of hundredths, in another order
