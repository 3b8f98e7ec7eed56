"""`check`: the stored limits again, on what is still there of model and texts."""

from __future__ import annotations

import shutil

import pytest

from trilemma.core.errors import CheckpointError, InputError
from trilemma.search.check import check
from trilemma.search.run import optimize


@pytest.fixture(scope="module")
def promised(tiny_checkpoint, tiny_text, tmp_path_factory):
    """An output of `optimize`, its original and its texts, in folders of its own."""
    place = tmp_path_factory.mktemp("promised")
    original, text = place / "model", place / "words.txt"
    shutil.copytree(tiny_checkpoint.path, original)
    shutil.copy(tiny_text, text)
    limits = ("weights<=90%", "ttft<=10000%", "ppl_increase<=50%")
    result = optimize(original, limits=limits, data=text, output=place / "out", time=8, threads=1, context=48)
    assert result.exit_code == 0, result.report.decision.sentence
    return place


@pytest.fixture
def here(promised, tmp_path):
    """A copy to damage; the report's paths lead to the copies."""
    place = tmp_path / "copy"
    shutil.copytree(promised, place)
    report = place / "out" / "report.json"
    report.write_text(report.read_text().replace(str(promised), str(place)))
    return place


def outcomes(result):
    return {verdict.limit.metric: verdict.outcome for verdict in result.verdicts}


def test_all_limits_pass_again(here):
    result = check(here / "out", threads=1)
    assert set(outcomes(result).values()) == {"PASS"}
    assert (result.exit_code, result.notes) == (0, ())


def test_without_the_original_only_bytes_can_be_judged(here):
    shutil.rmtree(here / "model")
    result = check(here / "out", threads=1)
    assert outcomes(result) == {"weights_bytes": "PASS", "ttft_s": "INCONCLUSIVE", "ppl_increase": "INCONCLUSIVE"}
    assert result.exit_code == 4
    assert any("--original" in note for note in result.notes)
    with pytest.raises(CheckpointError):
        check(here / "out", original=here / "nowhere", threads=1)


def test_another_original_is_refused(here, hearth_path):
    with pytest.raises(InputError, match="is not the model"):
        check(here / "out", original=hearth_path, threads=1)


def test_changed_texts_leave_quality_open_until_text_is_given(here, tiny_text):
    (here / "words.txt").write_text("other words")
    result = check(here / "out", threads=1)
    assert outcomes(result)["ppl_increase"] == "INCONCLUSIVE"
    assert any("--data" in note for note in result.notes)
    assert outcomes(check(here / "out", data=tiny_text, threads=1))["ppl_increase"] == "PASS"


def test_a_flipped_byte_is_found(here):
    weights = here / "out" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1000] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"changed|checksum|damaged"):
        check(here / "out", threads=1)


def test_what_is_no_output_of_a_search_is_refused(tmp_path, hearth_path):
    with pytest.raises(InputError, match="no folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"report\.json"):
        check(hearth_path)
