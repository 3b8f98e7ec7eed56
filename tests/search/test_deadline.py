"""Times as people write them, and the count-down."""

import pytest

from trilemma.core.errors import InputError
from trilemma.search.deadline import Deadline, parse_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20s", 20), ("5m", 300), ("1.5h", 5400), ("90", 90), (90, 90), (0.5, 0.5), (" 2 min ", 120), ("30sec", 30)],
)
def test_times_are_read(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5m", "soon", "5 days", "1e3", "5m30s", "nan", "inf"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(InputError, match="above zero"):
        parse_time(text)


def test_the_countdown_never_goes_below_zero():
    now = [100.0]
    deadline = Deadline(10, clock=lambda: now[0])
    assert deadline.allows(6, reserve_s=4)
    assert not deadline.allows(6, reserve_s=4.1)
    now[0] = 107.5
    assert (deadline.spent_s, deadline.left_s) == (7.5, 2.5)
    now[0] = 200.0
    assert deadline.left_s == 0
    assert deadline.allows(0)
    assert not deadline.allows(0.1)
