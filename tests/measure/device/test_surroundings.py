"""Caches, power and batteries from trees of files and counters made for the test."""

from __future__ import annotations

import itertools

import pytest

from trilemma.measure.device import surroundings
from trilemma.measure.device.surroundings import battery_wh, cache_sizes, power_figures, storage_rate
from trilemma.measure.energy.energy_model import DEVICES


def tree(root, levels):
    for index, (level, kind, size) in enumerate(levels):
        folder = root / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([(1, "Data", "32K"), (1, "Instruction", "32K"), (2, "Unified", "1024K"), (3, "Unified", "32768K")],
         {2: 1 << 20, 3: 32 << 20}),
        ([(1, "Data", "64K"), (2, "Unified", "512K")], {2: 512 << 10, 3: 512 << 10}),
        ([], {2: 1 << 20, 3: 16 << 20}),
        ([(2, "Unified", "?")], {2: 1 << 20, 3: 16 << 20}),
    ],
)  # fmt: skip
def test_cache_sizes(tmp_path, levels, expected):
    assert cache_sizes(tree(tmp_path, levels)) == expected


class Counter:
    """So many joules more at each reading."""

    name, scope, reason, resolution_j, wrap_j = "rapl-package", "package", None, 1e-6, None

    def __init__(self, joules):
        self._total, self._steps = 0.0, itertools.cycle(joules)

    def read(self):
        self._total += next(self._steps)
        return self._total


def test_power_from_a_counter(monkeypatch):
    monkeypatch.setattr(surroundings, "_WINDOW_S", 0.05)
    idle, active = power_figures(DEVICES["laptop"], 4, lambda: None, sensors=[Counter([0.0, 0.2, 0.0, 0.6])])
    assert idle.basis == active.basis == "measured"
    assert "rapl-package" in idle.claim
    assert 0 < idle.value < active.value


def test_power_of_the_class_where_no_counter_can_be_read():
    idle, active = power_figures(DEVICES["board"], 4, lambda: None, sensors=[])
    assert idle.basis == active.basis == "assumed"
    assert "board" in idle.claim
    assert active.value - idle.value == pytest.approx(4 * DEVICES["board"].core_w)


def test_batteries_add_up(tmp_path):
    assert battery_wh(tmp_path) is None
    for name, charge in (("BAT0", "50000000"), ("BAT1", "11000000"), ("BAT2", "words")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_full").write_text(charge)
    assert battery_wh(tmp_path) == pytest.approx(61.0)


def test_storage(tmp_path, monkeypatch):
    monkeypatch.setattr(surroundings, "_STORAGE_BYTES", 1 << 20)
    monkeypatch.setattr(surroundings, "_BLOCK", 1 << 18)
    assert (storage_rate(tmp_path) or 0) > 0
    assert list(tmp_path.iterdir()) == []
    assert storage_rate(tmp_path / "nowhere") is None
