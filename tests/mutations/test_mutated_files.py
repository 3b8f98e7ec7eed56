"""A seeded part of the damage that `make fuzz` does: every mutant is a working model or one clear error."""

from __future__ import annotations

import json

import fuzz
import pytest
import samples

from trilemma.core.errors import CheckpointError
from trilemma.formats.artifact import load_any


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_end_in_a_model_or_in_one_clear_error(tmp_path, kind):
    outcomes, faults = fuzz.run(kind, count=50, seed=7, folder=tmp_path)
    assert not faults, "\n".join(faults)
    assert sum(outcomes.values()) == 50
    assert outcomes["runs"] >= 1  # damage that is no damage: else something else was refused all along
    assert outcomes["CheckpointError"] >= 10


@pytest.mark.parametrize(
    ("key", "value"), [("head_dim", 1 << 40), ("hidden_size", 1 << 31), ("num_hidden_layers", 10**9)]
)
def test_sizes_that_no_model_has_are_refused_before_they_cost_memory(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({**samples.SMALL, key: value}))
    with pytest.raises(CheckpointError, match=f"'{key}' is {value}; at most"):
        load_any(tmp_path)
