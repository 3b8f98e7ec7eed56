"""The main job from end to end on a tiny random model: every way in which it can end."""

from __future__ import annotations

import json

import pytest

from trilemma.core.errors import DataError, InputError, LimitError, OutputError
from trilemma.core.results import read_report
from trilemma.report import render
from trilemma.search.run import optimize
from trilemma.search.space import candidates
from trilemma.techniques.apply import compress

EASY = ("weights<=90%", "ppl_increase<=50%", "peak_memory<=4GB")


@pytest.fixture(scope="module")
def search(tiny_checkpoint, tiny_text):
    """`search(output, **changes)` runs `optimize` on one thread in a few seconds."""

    def run(output, **changes):
        settings = {"limits": EASY, "data": [tiny_text], "time": 12, "threads": 1, "context": 48, "render": render}
        return optimize(tiny_checkpoint.path, output=output, **(settings | changes))

    return run


@pytest.fixture(scope="module")
def easy(search, tmp_path_factory):
    output = tmp_path_factory.mktemp("easy") / "out"
    return search(output), output


class Stop:
    """A progress callback that interrupts as Ctrl-C does when a stage has done so many steps."""

    def __init__(self, stage, done):
        self.stage, self.done, self.seen = stage, done, []

    def __call__(self, progress):
        self.seen.append(progress)
        if progress.stage == self.stage and progress.done >= self.done:
            raise KeyboardInterrupt


def test_easy_limits_pass_and_leave_a_model_with_its_evidence(easy):
    result, output = easy
    assert (result.exit_code, result.report.decision.outcome) == (0, "PASS"), result.report.decision.sentence
    assert result.output == output
    assert [v.outcome for v in result.verdicts] == ["PASS"] * 3
    assert result.best.status == "measured"
    assert result.best.name in {trial.name for trial in result.report.trials}
    stored = read_report((output / "report.json").read_text())
    assert stored == result.report
    assert (output / "report.html").read_text() == render(stored)
    assert not output.with_name("out.search").exists()
    assert result.report.decision.binding_limit in EASY
    assert not result.unfinished


def test_every_recipe_is_accounted_for(easy, tiny_model):
    report = easy[0].report
    statuses = {trial.name: trial.status for trial in report.trials}
    assert set(statuses) >= {recipe.name for recipe in candidates(tiny_model().config)}
    assert not [trial for trial in report.trials if trial.status == "failed"]
    for trial in report.trials:
        assert bool(trial.reason) == (trial.status == "dropped")
        if trial.status == "measured":
            assert {"weights_bytes", "tpot_s", "kl_mean", "ppl_increase", "engine_memory_bytes"} <= set(
                trial.measurements
            )
            assert "tpot_s" in trial.paired_baseline


def test_the_front_is_not_dominated(easy):
    report = easy[0].report
    trials = [trial for trial in (report.baseline, *report.trials) if trial.status != "dropped"]
    point = {t.name: tuple(t.value(m) for m in ("weights_bytes", "tpot_s", "kl_mean")) for t in trials}
    for name in report.front:
        assert not any(
            all(a <= b for a, b in zip(p, point[name], strict=True)) and p != point[name] for p in point.values()
        )


def test_confirm_saw_other_text_than_the_search(easy):
    report = easy[0].report
    tokens = {part.name: part.tokens for part in report.data}
    assert tokens["confirm"] == report.conditions.confirm_tokens > 0
    assert tokens["select"] == report.conditions.select_tokens > 0
    searched = next(trial for trial in report.trials if trial.name == report.confirmed.name)
    assert searched.value("kl_mean") != report.confirmed.value("kl_mean")
    assert report.answers
    assert sum(row.chosen_bytes for row in report.bytes_by_role) == report.confirmed.value("weights_bytes")


def test_leaders_are_timed_side_by_side(search, tmp_path):
    result = search(tmp_path / "out", limits=("weights<=90%", "ppl_increase<=50%"), time=8)
    measured = [trial for trial in result.report.trials if trial.status == "measured"]
    runs = [trial.paired_baseline["tpot_s"].samples for trial in measured]
    together = max(runs.count(run) for run in runs)
    assert 2 <= together <= min(8, len(measured))  # fewer when time is short; alone every run is a trial's own
    assert any(f"the {together} leading candidates" in note for note in result.report.notes)
    chosen = next(trial for trial in measured if trial.name == result.report.decision.chosen)
    assert runs.count(chosen.paired_baseline["tpot_s"].samples) == together


def test_replaying_the_recipe_gives_the_same_bytes(easy, tiny_checkpoint, tiny_text, tmp_path):
    _, output = easy
    compress(tiny_checkpoint.path, tmp_path / "again", recipe=output / "recipe.yaml", data=[tiny_text], threads=1)
    for name in ("model.safetensors", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()


def test_an_impossible_limit_is_named_and_nothing_is_written(search, tmp_path):
    result = search(tmp_path / "out", limits=("weights<=5%", "ppl_increase<=50%"))
    assert (result.exit_code, result.best, result.output) == (3, None, None)
    decision = result.report.decision
    assert (decision.outcome, decision.chosen, decision.binding_limit) == ("FAIL", None, "weights<=5%")
    assert decision.sentence.startswith("No recipe can keep weights<=5%: of the smallest, ")
    assert decision.nearest
    assert all("by arithmetic" in trial.reason for trial in result.report.trials)
    assert list(tmp_path.iterdir()) == []
    assert render(result.report)


def test_without_limits_the_fastest_within_one_per_cent(search, tmp_path):
    result = search(tmp_path / "out", time=2, limits=())
    report = result.report
    assert report.objective == "least tpot_s with ppl_increase<=1%"
    assert [limit.text for limit in report.limits] == ["ppl_increase<=1%"]
    assert result.exit_code in (0, 3, 4)
    assert (result.output is not None) == (result.best is not None)
    if report.decision.alternatives:
        assert list(report.decision.alternatives) == ["smallest", "balanced", "safest"]
        assert set(report.decision.alternatives.values()) <= {trial.name for trial in report.trials}


def test_without_an_output_nothing_stays(search, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = search(None, time=0.5, limits=("weights<=90%",))
    assert result.output is None
    assert list(tmp_path.iterdir()) == []


def test_too_little_time_measures_one_candidate_and_does_not_guess(search, tmp_path, monkeypatch):
    limits = ("weights<=90%", "ppl_increase<=50%")
    with monkeypatch.context() as changed:
        changed.setattr("trilemma.search.conclude.LEAST_OVERRUN_S", 0.0)
        result = search(tmp_path / "out", time=0.01, limits=limits)
    assert (result.exit_code, result.report.decision.outcome) == (4, "INCONCLUSIVE")
    assert [trial.status for trial in result.report.trials].count("measured") == 1
    assert "too short" in result.report.decision.sentence
    assert result.best is None
    assert [path.name for path in tmp_path.iterdir()] == ["out.search"]
    assert render(result.report)
    assert search(tmp_path / "out", time=10, limits=limits).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_with_much_time_nothing_is_dropped_for_lack_of_it(search, tiny_model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "out", time="1h", limits=("ppl_increase<=50%",), progress=Stop("confirm", 0))
    lines = (tmp_path / "out.search" / "trials.jsonl").read_text().splitlines()
    measured = {json.loads(line)["trial"]["name"] for line in lines}
    assert measured >= {recipe.name for recipe in candidates(tiny_model().config)}
    assert any(name.endswith("bit") for name in measured)  # allocations from sensitivities were tried too


def test_an_interruption_leaves_the_output_and_the_next_run_goes_on(search, tmp_path):
    output, stop = tmp_path / "out", Stop("search", 3)
    output.mkdir()
    with pytest.raises(KeyboardInterrupt):
        search(output, time=10, limits=EASY[:2], progress=stop)
    assert list(output.iterdir()) == []
    lines = (tmp_path / "out.search" / "trials.jsonl").read_text().splitlines()
    assert len(lines) == 2
    finished = {json.loads(line)["trial"]["name"]: json.loads(line)["trial"] for line in lines}
    result = search(output, time=10, limits=EASY[:2])
    assert result.exit_code == 0
    found = {trial.name: json.loads(trial.model_dump_json()) for trial in result.report.trials}
    for name, trial in finished.items():
        for metric in ("kl_mean", "perplexity", "build_s"):  # not measured again: to the last digit
            assert found[name]["measurements"][metric] == trial["measurements"][metric]
        assert any(note.startswith(name) and "taken over" in note for note in result.report.notes)
    assert (output / "model.safetensors").is_file()
    assert not (tmp_path / "out.search").exists()


def test_a_foreign_folder_and_an_artifact_are_refused(search, easy, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        search(tmp_path)
    with pytest.raises(OutputError, match="not empty"):
        search(tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    before = (easy[1] / "report.json").read_bytes()
    with pytest.raises(OutputError, match="--force"):
        search(easy[1])
    assert (easy[1] / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"limits": ("speed<=5",)}, LimitError, "speed"),
        ({"limits": ("battery>=3h",)}, LimitError, "does not measure"),
        ({"minimize": "nonsense"}, LimitError, "nonsense"),
        ({"time": "soon"}, InputError, "soon"),
        ({"data": None}, DataError, "--data"),
        ({"data": ["nowhere.txt"]}, DataError, "nowhere"),
        ({"context": 5000}, InputError, "5000"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(search, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        search(tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []
