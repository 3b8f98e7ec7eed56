"""What every metric of the vocabulary promises: unit, direction, a limit that parses, a page that names it."""

from __future__ import annotations

import pytest

from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.metric import METRICS
from trilemma.core.quantity import format_quantity


@pytest.mark.parametrize("name", METRICS)
def test_declares_unit_and_direction_and_takes_a_limit(name):
    metric = METRICS[name]
    assert metric.name == name
    assert metric.unit
    assert metric.what
    assert metric.direction in ("lower", "higher")
    op = "<=" if metric.direction == "lower" else ">="
    for called in filter(None, (name, metric.alias)):
        assert Limit.parse(f"{called}{op}3").metric == name
        assert Limit.parse(f"{called}{op}3%").metric == name


@pytest.mark.parametrize("name", METRICS)
def test_a_name_carries_its_unit(name):
    suffixes = {"bytes": "bytes", "s": "_s", "W": "_w", "h": "_h", "tokens/s": "tokens_per_s"}
    suffix = suffixes.get(METRICS[name].unit)
    assert suffix is None or name.endswith(suffix) or name == "kv_bytes_per_token"


@pytest.mark.parametrize("name", METRICS)
def test_a_record_keeps_samples_and_survives_json(name):
    record = Measurement.of(name, 2.5, ci95=(2.0, 3.0), n=3, samples=(2.0, 2.5, 3.0), conditions={"context": 512})
    assert Measurement.model_validate_json(record.model_dump_json()) == record
    missing = Measurement.unavailable(name, "no sensor here")
    assert Measurement.model_validate_json(missing.model_dump_json()).value is None
    assert format_quantity(record.value, record.unit) != format_quantity(missing.value, missing.unit)
