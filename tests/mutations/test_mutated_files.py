"""A seeded part of the damage that `make fuzz` does: every mutant is a working model or one clear error."""

from __future__ import annotations

import fuzz
import pytest


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_end_in_a_model_or_in_one_clear_error(tmp_path, kind):
    outcomes, faults = fuzz.run(kind, count=50, seed=7, folder=tmp_path)
    assert not faults, "\n".join(faults)
    assert sum(outcomes.values()) == 50
    assert outcomes["runs"] >= 1  # damage that is no damage: else something else was refused all along
    assert outcomes["CheckpointError"] >= 10
