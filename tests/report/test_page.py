"""The page of evidence: well-formed, self-contained, escaped, and honest about what is no measurement."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from sample import sample, sample_bench

from made_up_trials import BASELINE, INT4_G32, INT8, measured, trial
from trilemma.core.limit import Limit
from trilemma.core.measurement import Measurement
from trilemma.core.results import Answer, Decision, read_bench, read_report
from trilemma.report import render, render_cost
from trilemma.report.numbers import ratio
from trilemma.search.judge import judge_trial, relative

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Checks that every element is closed in order; collects tags, attributes and text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words, self.errors = [], [], [], [], []
        self.feed(html)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page_of(report):
    page = Page(render(report))
    assert page.errors == []
    assert page.open == []
    return page


def judged(**measurements):
    """A report on the limits tpot<=1ms and energy<=1J with such values."""
    texts = ("tpot<=1ms", "energy<=1J")
    given = [Limit.parse(text) for text in texts]
    changed = INT4_G32.model_copy(update={"measurements": {**INT4_G32.measurements, **measurements}})
    verdicts = judge_trial(changed, given, BASELINE)
    return sample(confirmed=changed, verdicts=verdicts, limits=texts)


def test_the_first_screen_says_what_to_do():
    report = sample()
    page = page_of(report)
    assert report.decision.sentence in page.text
    places = [
        page.text.index(words)
        for words in ("PASS", report.decision.sentence, "Limits", "The front", "What changed", "Why it is cheaper")
    ]
    assert places == sorted(places)
    assert page.tags.count("svg") == len(report.verdicts) + 3  # limits, two scatters, bytes


def test_nothing_outside_the_page_is_referred_to():
    for html in (render(sample()), render_cost(sample_bench())):
        page = Page(html)
        assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
        assert not {"src", "href", "srcset", "action", "onclick"} & {name for name, _ in page.attributes}
        assert not re.search(r"https?:|//[a-z]|@import|url\(", html.replace("<!doctype html>", ""))


def test_what_users_wrote_is_escaped():
    evil = "<script>alert('x')</script>&amp;\"'"
    odd = trial(evil, weights=5e6, tpot=1.1e-3, kl=5e-3, ppl=0.01)
    report = sample(
        model=evil, command=evil, notes=(evil,), trials=(odd,), front=(evil,), confirmed=odd,
        decision=Decision(sentence=evil, chosen=evil, outcome="PASS", alternatives={"smallest": evil}),
        answers=(Answer(prompt=evil, original=evil, chosen=evil + "!", first_difference=3),),
    )  # fmt: skip
    page = page_of(report)
    assert "script" not in page.tags
    assert page.text.count(evil) >= 6


@pytest.mark.parametrize("outcome", ["PASS", "FAIL", "INCONCLUSIVE"])
def test_every_kind_of_verdict_is_shown_with_its_reason(outcome):
    value, half = {"PASS": (0.5e-3, 0.01e-3), "FAIL": (5e-3, 0.01e-3), "INCONCLUSIVE": (1e-3, 0.3e-3)}[outcome]
    report = judged(tpot_s=measured("tpot_s", value, half))
    found = report.verdicts[0]
    assert found.outcome == outcome
    page = page_of(report)
    assert found.reason in page.text
    assert outcome in page.text
    if found.settle:
        assert f"To settle it: {found.settle}" in page.text
    assert ("class", f"point {outcome.lower()}") in page.attributes


def test_estimates_and_unknowns_are_marked():
    guess = measured("energy_j_per_output_token", 0.1, 0.05, source="estimated")
    page = page_of(judged(energy_j_per_output_token=guess, tpot_s=measured("tpot_s", 5e-4, 1e-5, noisy=True)))
    assert "estimated" in page.text
    assert "noisy" in page.text
    assert "it is an estimate" in page.text
    page = page_of(judged(energy_j_per_output_token=Measurement.unavailable("energy", "no counter on this host")))
    assert "no counter on this host" in page.text


def test_nothing_chosen():
    decision = Decision(sentence="None keeps every limit.", chosen=None, outcome="FAIL", binding_limit="weights<=5%")
    verdicts = judge_trial(INT8, [Limit.parse("weights<=5%")], BASELINE)
    report = sample(decision=decision, confirmed=None, answers=(), bytes_by_role=(), verdicts=verdicts)
    page = page_of(report)
    assert "None keeps every limit." in page.text
    assert "Of the nearest candidate" in page.text
    assert "What changed" not in page.text


def test_chosen_but_not_confirmed_is_said():
    decision = Decision(sentence="Too short.", chosen="W4A8-g32", outcome="INCONCLUSIVE")
    page = page_of(sample(decision=decision, confirmed=None, answers=(), bytes_by_role=()))
    assert "not confirmed" in page.text


def test_a_report_of_a_baseline_alone():
    decision = Decision(sentence="Nothing.", chosen=None, outcome="FAIL")
    report = sample(trials=(), front=(), verdicts=(), answers=(), bytes_by_role=(), confirmed=None, data=(), limits=(),
                    decision=decision, conditions=None, data_files=(), notes=(), command="")  # fmt: skip
    assert "0 of 0 candidates" in page_of(report).text


def test_every_trial_stands_in_the_table_with_why_it_was_not_measured():
    report = sample()
    page = page_of(report)
    for item in report.trials:
        assert item.name in page.text
    assert "failed: singular matrix" in page.text


def test_answers_part_at_a_word():
    page = page_of(sample())
    assert "differs from token 3 on" in page.text
    assert "1 of 2 stay the same" in page.text
    html = render(sample())
    assert " on the <mark>mat and slept.</mark>" in html
    assert " on the <mark>moon and sang.</mark>" in html


def test_alternatives_name_each_trial_once():
    names = {"smallest": "W4A8-g32", "balanced": "W8A8", "safest": "W8A8"}
    decision = sample().decision.model_copy(update={"alternatives": names})
    assert "W4A8-g32 is the smallest; W8A8 is the balanced and the safest." in page_of(
        sample(decision=decision)
    ).text.replace("> ", ">").replace(" .", ".")


def test_records_survive_json_and_render_the_same():
    report, bench = sample(), sample_bench()
    again = read_report(report.model_dump_json())
    assert again == report
    assert render(again) == render(report)
    assert render_cost(read_bench(bench.model_dump_json())) == render_cost(bench)


def test_a_record_of_before_renders():
    """Fields that came later have defaults: an old file without them is still read."""
    old = json.loads(sample().model_dump_json())
    for name in ("conditions", "data_files", "notes", "command", "seconds"):
        del old[name]
    del old["decision"]["alternatives"]
    assert page_of(read_report(json.dumps(old)))


def test_the_cost_panel_is_labelled_and_shows_no_quality():
    bench = sample_bench()
    page = Page(render_cost(bench))
    assert page.errors == []
    assert "Cost panel" in page.text
    assert "random weights" in page.text
    assert "estimated" in page.text
    for words in ("KL", "erplexity", "agreement", "PASS"):
        assert words not in page.text
    assert "Cost panel" not in page_of(sample()).text


def test_the_tiles_say_the_same_share_as_the_verdicts():
    ours = measured("tpot_s", 1.0e-3, 1e-5, samples=(0.9e-3, 1.0e-3, 2.0e-3))
    theirs = measured("tpot_s", 2.0e-3, 1e-5, samples=(2.0e-3, 1.9e-3, 2.1e-3))
    assert ratio(ours, theirs) == pytest.approx(relative(ours, theirs)[0])
    unpaired = ours.model_copy(update={"samples": ()})
    assert ratio(unpaired, theirs) == relative(unpaired, theirs)[0] == 0.5
