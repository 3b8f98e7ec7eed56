"""The pages: whole documents that refer to nothing outside, say every verdict, and escape what users wrote."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from sample import sample, sample_bench

from made_up_trials import BASELINE
from trilemma.core.errors import InputError
from trilemma.core.results import Answer, Decision, read_bench, read_report
from trilemma.report import render, render_cost

VOID = {"meta", "br", "link", "img", "hr", "input", "rect", "line", "circle", "path", "polyline", "polygon"}


class Page(HTMLParser):
    """Checks nesting and gathers tags, attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.mark.parametrize("html", [render(sample()), render_cost(sample_bench())], ids=["quality", "cost"])
def test_a_page_is_whole_and_needs_no_network(html):
    page = Page(html)
    assert html.lstrip().startswith("<!doctype html>")
    assert "script" not in page.tags
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert "@import" not in html
    assert "url(http" not in html
    assert len(html) < 300_000


def test_the_first_screen_says_the_decision_and_every_limit():
    report = sample()
    words = Page(render(report)).words
    assert words.index(report.decision.sentence) < 400
    for verdict in report.verdicts:
        assert verdict.reason in words
        assert words.index(verdict.reason) < words.index("The front") < words.index("What changed")
    assert words.index("What changed") < words.index("Why it is cheaper") < words.index("Every trial")


@pytest.mark.parametrize(
    ("limits", "outcome"),
    [(("weights<=50%",), "PASS"), (("weights<=1%",), "FAIL"), (("energy<=1kJ",), "INCONCLUSIVE")],
)
def test_every_verdict_is_shown(limits, outcome):
    report = sample(limits)
    assert {verdict.outcome for verdict in report.verdicts} == {outcome}
    page = Page(render(report))
    assert outcome in page.words
    assert ("class", f"chip {outcome.lower()}") in page.attributes


def test_nothing_chosen_still_makes_a_page():
    decision = Decision(sentence="None of the candidates keeps every limit.", chosen=None, outcome="FAIL")
    words = Page(render(sample(confirmed=None, answers=(), bytes_by_role=(), decision=decision))).words
    assert "None of the candidates" in words
    assert "As measured on the select text" in words
    assert "What changed" not in words


def test_what_users_wrote_is_escaped():
    evil = '<script>alert("x")</script><img src="http://x.example/y.png">'
    answer = Answer(prompt=evil, original=evil, chosen="b" + evil, first_difference=0)
    html = render(sample(answers=(answer,), model=evil, command=evil, notes=(evil,)))
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "<script" not in html


def test_estimates_and_noise_carry_a_badge():
    noisy = {name: item.model_copy(update={"noisy": True}) for name, item in BASELINE.measurements.items()}
    words = Page(render(sample(baseline=BASELINE.model_copy(update={"measurements": noisy})))).words
    assert "noisy" in words
    assert "estimated" in Page(render_cost(sample_bench())).words


def test_the_cost_page_shows_no_quality_and_says_what_is_random():
    words = Page(render_cost(sample_bench())).words.lower()
    assert "random weights" in words
    for quality in ("perplexity", "kl divergence", "agreement"):
        assert quality not in words


def test_old_records_render_as_when_they_were_new():
    report, bench = sample(), sample_bench()
    assert render(read_report(report.model_dump_json())) == render(report)
    assert render_cost(read_bench(bench.model_dump_json())) == render_cost(bench)


def test_a_record_of_another_version_is_refused():
    text = sample().model_dump_json().replace('"schema_version":1', '"schema_version":99', 1)
    with pytest.raises(InputError, match="schema"):
        read_report(text)
