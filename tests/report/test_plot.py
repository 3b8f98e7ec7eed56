"""Stand-alone pictures: whole documents, points where the axes say, words that stay inside and apart."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from trilemma.core.errors import OutputError
from trilemma.report.dot_chart import Dot, dot_chart
from trilemma.report.plot import Axis, Chart, Mark, Point, Series, _spread, chart_row, line_chart, write_plot
from trilemma.report.scale import Scale
from trilemma.report.triangle import Version
from trilemma.report.versions_chart import versions_chart

SVG = "{http://www.w3.org/2000/svg}"


def parse(text):
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert float(root.get("width")) > 0
    return root


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def dots(root):
    return [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]


def test_points_lie_where_the_axes_say(random_generator):
    xs = [1, *sorted(random_generator.uniform(1, 1000, 3).tolist()), 1000]
    ys = [1e-4, *random_generator.uniform(1e-4, 10, 3).tolist(), 10]
    root = parse(
        line_chart([Series("a", [Point(x, y) for x, y in zip(xs, ys, strict=True)])], "x", "y", title="T",
                   log_x=True, log_y=True, y_unit="s")
    )  # fmt: skip
    found = dots(root)
    assert len(found) == 5
    # positions are straight in the logarithm: equal ratios of distances
    for pick, values in ((0, xs), (1, ys)):
        places = [dot[pick] for dot in found]
        logs = [math.log(value) for value in values]
        slope = (places[-1] - places[0]) / (logs[-1] - logs[0])
        for place, log in zip(places, logs, strict=True):
            assert place == pytest.approx(places[0] + slope * (log - logs[0]), abs=0.2)
        assert (slope > 0) == (pick == 0)  # y grows upwards


def test_everything_is_said_and_inside():
    lines = [
        Series(f"a rather long name {n}", [Point(x, 10.0**n * x, (9.0**n * x, 11.0**n * x)) for x in (1, 10, 100)])
        for n in range(4)
    ]
    chart = Chart(
        lines, Axis("across", log=True), Axis("up", "bytes", log=True), "panel",
        [Mark("limit <1 kB>", y=1000.0), Mark("here", x=20.0)], ["a note & more"],
    )  # fmt: skip
    root = parse(chart_row([chart, chart], title="Title & <words>"))
    words = texts(root)
    for wanted in ("Title & <words>", "panel", "across", "up", "limit <1 kB>", "here", "a note & more", "1 kB"):
        assert wanted in words
    assert sum(word == "a rather long name 2" for word in words) == 2
    width, height = float(root.get("width")), float(root.get("height"))
    for element in root.iter(f"{SVG}text"):
        assert 0 <= float(element.get("x")) <= width
        assert 0 <= float(element.get("y")) <= height
    assert "http" not in "".join(word for word in words)
    assert root.find(f"{SVG}style") is not None


def test_names_in_the_margin_keep_apart(random_generator):
    for _ in range(30):
        wanted = sorted(random_generator.uniform(0, 100, int(random_generator.integers(1, 7))).tolist())
        found = _spread(wanted, 16)
        assert all(b - a >= 16 - 1e-9 for a, b in pairwise(found))
        if all(b - a >= 16 for a, b in pairwise(wanted)):
            assert found == pytest.approx(wanted)


def test_points_that_a_log_axis_can_not_hold_are_left_out():
    line = Series("a", [Point(0, 1), Point(1, 0), Point(2, 5, (0.0, 9.0)), Point(3, math.nan)])
    assert len(dots(parse(line_chart([line], "x", "y", title="", log_x=True, log_y=True)))) == 1
    with pytest.raises(ValueError, match="at least one point"):
        line_chart([Series("a", [Point(0, 1)])], "x", "y", title="", log_x=True)


def test_ticks_read_well():
    scale = Scale(Axis("t", "s", log=True), [1e-3, 5e-2], 0, 100)
    words = [scale.words(tick) for tick in scale.ticks()]
    assert words == ["1 ms", "2 ms", "5 ms", "10 ms", "20 ms", "50 ms"]
    linear = Scale(Axis("m", "bytes"), [0, 3.1e6], 0, 100)
    assert [linear.words(tick) for tick in linear.ticks()] == ["0 B", "1 MB", "2 MB", "3 MB"]
    shares = Scale(Axis("p", "ratio"), [-0.01, 0.02], 0, 100)
    assert [shares.words(tick) for tick in shares.ticks()] == ["-1%", "0%", "1%", "2%"]


def test_dots_by_group():
    rows = [
        ("kids", [Dot(0.01, (0.0, 0.02), "+1.0%"), Dot(None)]),
        ("code", [Dot(0.2, None, "+20%"), Dot(0.1, None, "x")]),
    ]
    root = parse(dot_chart(["one", "two"], rows, Axis("increase", "ratio"), title="By domain", notes=["n " * 200]))
    assert len(dots(root)) == 3 + 2  # and two in the legend
    assert {"one", "two", "kids", "code", "+1.0%", "+20%"} <= set(texts(root))


def test_a_plot_replaces_plots_only(tmp_path):
    svg = line_chart([Series("a", [Point(1, 1), Point(2, 2)])], "x", "y", title="T")
    target = tmp_path / "a.svg"
    write_plot(target, svg)
    write_plot(target, svg)
    assert target.read_text(encoding="utf-8") == svg
    assert [item.name for item in tmp_path.iterdir()] == ["a.svg"]
    (tmp_path / "b.svg").write_text("my notes")
    for bad in (tmp_path / "b.svg", tmp_path / "a.png", tmp_path / "nowhere" / "a.svg", tmp_path):
        with pytest.raises(OutputError):
            write_plot(bad, svg)
    assert (tmp_path / "b.svg").read_text() == "my notes"


def test_versions_stand_over_memory_and_over_time():
    versions = [Version("small", 4e6, 1e-4, 0.02), Version("large", 7e6, 2e-4, 0.0004), Version("same", 9e6, 3e-4, 0.0)]
    svg = versions_chart(versions, title="two", reference=(1.4e7, 3e-4))
    assert svg.count(">small<") == svg.count(">large<") == svg.count(">original<") == 2
    assert ">same<" not in svg
    with pytest.raises(ValueError, match="no version"):
        versions_chart(versions[2:], title="none")
