"""Times of products from a table: laws put in are found again at shapes, tokens and sizes that are not in it."""

from __future__ import annotations

import pytest

from made_up_host import LARGE, MAC_S, SMALL, STREAM_S, products, tables
from trilemma.formats.pack import format_bytes
from trilemma.measure.device.product_time import ProductTimes, between, fit_positive


def seconds(times, *, name="int8-g32", rows=300, cols=700, tokens=1, working_set=1.0):
    activation = {"f32": "f32", "bf16": "bf16"}.get(name, "int8-g32")
    return times.seconds(name, activation, rows, cols, tokens=tokens, threads=2, working_set=working_set)


@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (300, 700), (1500, 200), (20000, 576)])
@pytest.mark.parametrize("tokens", [1, 3, 8, 50, 128])
def test_a_law_in_macs_is_found_at_other_shapes_and_tokens(rows, cols, tokens):
    times = ProductTimes(tables(), format_bytes)
    assert seconds(times, rows=rows, cols=cols, tokens=tokens) == pytest.approx(rows * cols * tokens * MAC_S, rel=1e-6)


def test_a_fixed_cost_is_told_from_the_arithmetic():
    times = ProductTimes(tables(products=products(fixed_s=2e-6)), format_bytes)
    assert seconds(times) == pytest.approx(2e-6 + 300 * 700 * MAC_S, rel=1e-3)


def test_what_comes_from_memory_costs_more_by_its_bytes():
    times = ProductTimes(tables(), format_bytes)
    for name in ("f32", "int4-g32"):
        more = seconds(times, name=name, working_set=2 * LARGE) - seconds(times, name=name)
        assert more == pytest.approx(format_bytes(name, (300, 700)) * STREAM_S, rel=1e-6)
    middle = seconds(times, working_set=(SMALL * LARGE) ** 0.5)
    assert middle == pytest.approx((seconds(times) + seconds(times, working_set=LARGE)) / 2, rel=1e-6)


def test_a_disturbed_point_between_does_not_make_smaller_sets_slower_than_larger_ones():
    known = products()
    example = next(row for row in known if row.working_set_bytes == LARGE and row.tokens == 1 and row.format == "f32")
    slow = example.model_copy(update={"working_set_bytes": 30_000_000, "seconds": example.seconds * 5})
    times = ProductTimes(tables(products=(*known, slow)), format_bytes)
    assert seconds(times, name="f32", working_set=3e7) <= seconds(times, name="f32", working_set=LARGE) * 1.000001


def test_a_shape_that_deviates_pulls_its_neighbours_and_not_those_far_away():
    known = tuple(
        row.model_copy(update={"seconds": row.seconds * 3}) if (row.rows, row.cols) == (128, 128) else row
        for row in products()
    )
    times = ProductTimes(tables(products=known), format_bytes)
    near = seconds(times, rows=130, cols=126) / (130 * 126 * MAC_S)
    far = seconds(times, rows=2048, cols=2048) / (2048 * 2048 * MAC_S)
    assert near > 1.5
    assert far == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (("int4-g128", "int8-g32"), ("int4-g32", "int8-g32")),
        (("int8-channel", "int8-g32"), ("int8-g32", "int8-g32")),
        (("bf16", "f32"), ("bf16", "bf16")),
        (("f16", "bf16"), ("bf16", "bf16")),
        (("f32", "f32"), ("f32", "f32")),
    ],
)
def test_a_format_that_was_not_timed_takes_the_nearest(asked, taken):
    times = ProductTimes(tables(), format_bytes)
    got = times.stand_in(*asked)
    if asked == ("bf16", "f32"):  # same input precision, or same width: either way a floating format
        assert got[0] in ("bf16", "f32")
    else:
        assert got == taken


def test_costs_are_never_negative():
    assert min(fit_positive([(1, 1.0), (1, 2.0), (1, 3.0)], [1.0, 3.0, 5.0])) >= 0


def test_between():
    assert between([1, 3], [10, 30], 2) == 20
    assert between([1, 3], [10, 30], 5) == 50
    assert between([1, 3], [10, 30], 5, flat=True) == 30
    assert between([1, 3, 4], [10, 30, 0], 0) == 0
    assert between([7], [3], 100) == 3
