"""`check` on an artifact: the promises again, and what happens when something is missing, changed or broken."""

from __future__ import annotations

import shutil

import pytest

from trilemma.core.errors import CheckpointError, InputError
from trilemma.search.check import check
from trilemma.search.run import optimize

LIMITS = ("weights<=90%", "ppl_increase<=50%", "tpot<=1s")


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tiny_text, tmp_path_factory):
    """(artifact, model, text), all in one folder of their own."""
    folder = tmp_path_factory.mktemp("made")
    model, text = folder / "model", folder / "words.txt"
    shutil.copytree(tiny_checkpoint.path, model)
    shutil.copy(tiny_text, text)
    settings = {"limits": LIMITS, "data": [text], "time": 2, "threads": 1, "context": 48}
    assert optimize(model, output=folder / "out", **settings).exit_code == 0
    return folder


@pytest.fixture
def changed(made, tmp_path):
    """A copy of the artifact that a test may damage."""
    return shutil.copytree(made / "out", tmp_path / "out")


def outcomes(result):
    return {verdict.limit.metric: verdict.outcome for verdict in result.verdicts}


def test_the_limits_pass_again(made):
    result = check(made / "out", threads=1)
    assert (result.exit_code, result.notes) == (0, ())
    assert set(outcomes(result).values()) == {"PASS"}
    assert [verdict.limit.text for verdict in result.verdicts] == list(LIMITS)


def test_it_changes_nothing(made):
    before = {path.name: path.read_bytes() for path in (made / "out").iterdir()}
    check(made / "out", threads=1)
    assert {path.name: path.read_bytes() for path in (made / "out").iterdir()} == before


def test_without_the_original_only_bytes_and_absolute_limits_are_judged(made, tmp_path):
    hidden = made / "model-elsewhere"
    (made / "model").rename(hidden)
    try:
        result = check(made / "out", threads=1)
        assert outcomes(result) == {"weights_bytes": "PASS", "ppl_increase": "INCONCLUSIVE", "tpot_s": "PASS"}
        assert result.exit_code == 4
        assert any("--original" in note for note in result.notes)
        assert check(made / "out", original=hidden, threads=1).exit_code == 0
        with pytest.raises(CheckpointError):
            check(made / "out", original=tmp_path / "nowhere", threads=1)
    finally:
        hidden.rename(made / "model")


def test_another_original_is_refused(made, hearth_path):
    with pytest.raises(InputError, match="is not the model"):
        check(made / "out", original=hearth_path, threads=1)


@pytest.mark.parametrize("place", [0.3, 0.7, 0.999])
def test_a_flipped_byte_is_found(changed, place):
    file = changed / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError):
        check(changed, threads=1)


def test_texts_that_changed_leave_quality_open_until_text_is_given(made, tiny_text):
    text = made / "words.txt"
    text.write_text(text.read_text() + " balar")
    try:
        result = check(made / "out", threads=1)
        assert outcomes(result) == {"weights_bytes": "PASS", "ppl_increase": "INCONCLUSIVE", "tpot_s": "PASS"}
        assert any("--data" in note for note in result.notes)
        given = check(made / "out", data=tiny_text, threads=1)
        assert given.exit_code == 0
    finally:
        shutil.copy(tiny_text, text)


def test_a_folder_without_a_readable_report(changed, tmp_path):
    with pytest.raises(InputError, match="no folder"):
        check(tmp_path / "nowhere")
    (changed / "report.json").write_text('{"schema_version": 99}')
    with pytest.raises(InputError, match="schema version"):
        check(changed)
    (changed / "report.json").unlink()
    with pytest.raises(InputError, match="which limits"):
        check(changed)


def test_a_broken_promise_fails(changed):
    file = changed / "report.json"
    text = file.read_text()
    assert '"text": "tpot<=1s"' in text
    from trilemma.core.results import read_report

    report = read_report(text)
    strict = report.limits[2].model_copy(update={"value": 1e-9, "text": "tpot<=1ns"})
    file.write_text(report.model_copy(update={"limits": (*report.limits[:2], strict)}).model_dump_json())
    result = check(changed, threads=1)
    assert (result.exit_code, outcomes(result)["tpot_s"]) == (3, "FAIL")
