"""Pictures: round ticks, labels that cover nothing, bars that stay inside their frame."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from made_up_trials import BASELINE, measured, trial
from trilemma.core.limit import Limit
from trilemma.report.charts import front_scatter, limit_bar, stacked_bytes
from trilemma.report.svg import linear_ticks, log_ticks, place_labels, text_width
from trilemma.search.judge import verdict


def boxes(points, spots, size):
    for (_, _, words), spot in zip(points, spots, strict=True):
        if spot is not None:
            width = text_width(words, size)
            left = spot[0] - {"start": 0, "middle": width / 2, "end": width}[spot[2]]
            yield (left, spot[1] - 0.85 * size, left + width, spot[1] + 0.25 * size)


def test_labels_never_overlap(random_generator):
    points = [(float(x), float(y), "W4A8-g32" * int(n)) for x, y, n in zip(
        random_generator.uniform(20, 480, 25), random_generator.uniform(20, 280, 25),
        random_generator.integers(1, 3, 25), strict=True)]  # fmt: skip
    spots = place_labels(points, 12, (0, 0, 500, 300))
    placed = list(boxes(points, spots, 12))
    assert len(placed) > 5
    for index, one in enumerate(placed):
        assert one[0] >= 0
        assert one[2] <= 500
        for other in placed[:index]:
            assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (3.2e6, 14.1e6), (1e-4, 9e-4), (5.0, 5.0)):
        ticks = linear_ticks(low, high)
        assert ticks
        assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks)
    assert log_ticks(1e-5, 1e-2) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
    assert len(log_ticks(1e-12, 1.0)) <= 7


@pytest.mark.parametrize(
    "text", ["weights<=50%", "tpot<=20ms", "decode>=30", "ppl_increase<=2%", "top1_agreement>=95%"]
)
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 3.0])
def test_bars_are_well_formed_and_inside(text, factor):
    limit = Limit.parse(text)
    value = limit.value * factor * (100.0 if limit.relative else 1.0)
    base = measured(limit.metric, 100.0, 1.0) if limit.relative else None
    picture = limit_bar(verdict(limit, measured(limit.metric, value, value / 10 + 1e-6), base))
    root = ElementTree.fromstring(str(picture))
    width = float(root.attrib["viewBox"].split()[2])
    for shape in root.iter("rect"):
        assert float(shape.attrib["x"]) >= -0.1
        assert float(shape.attrib["x"]) + float(shape.attrib["width"]) <= width + 0.1


def test_no_value_no_bar():
    assert limit_bar(verdict(Limit.parse("tpot<=90%"), measured("tpot_s", 1.0, 0.1), None)) == ""


def test_scatters_hold_every_measured_trial_even_a_single_or_lossless_one():
    lossless = trial("lossless", weights=7e6, tpot=1e-3, kl=0.0, ppl=0.0)
    unknown = trial("unknown", weights=7e6)
    picture = str(
        front_scatter([BASELINE, lossless, unknown], ("baseline", "lossless"), "lossless", "baseline", "weights_bytes")
    )
    root = ElementTree.fromstring(picture)
    assert len(list(root.iter("circle"))) == 2
    assert not re.search("nan|inf", re.sub("<title>.*?</title>", "", picture))
    assert ElementTree.fromstring(str(front_scatter([BASELINE], (), None, "baseline", "tpot_s"))) is not None
    assert front_scatter([unknown], (), None, "baseline", "tpot_s") == ""


def test_no_bytes_no_picture():
    assert stacked_bytes(()) == ""
    assert np.isfinite(text_width("abc", 12))
