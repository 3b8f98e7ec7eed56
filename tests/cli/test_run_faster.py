"""`trilemma run` with a draft, with look-up and as a cascade: the same text, the figures, and what is refused."""

from __future__ import annotations

import json
import re

import pytest

from trilemma.formats.artifact import load_any
from trilemma.model.checkpoint import write_checkpoint

PROMPT = "Once upon a time"
FEW = ["--max-tokens", "14", "--threads", "1"]


@pytest.fixture(scope="module")
def small(hearth_path, tmp_path_factory):
    """The shipped model without its fourth layer."""
    model = load_any(hearth_path)
    kept = [index for index in range(len(model.config.layers)) if index != 3]
    config = model.config.model_copy(update={"layers": tuple(model.config.layers[index] for index in kept)})
    folder = tmp_path_factory.mktemp("cut") / "small"
    renamed = model.with_config(
        config, lambda name: re.sub(r"layers\.(\d+)", lambda found: f"layers.{kept[int(found[1])]}", name)
    )
    write_checkpoint(renamed, folder)
    return folder


@pytest.fixture(scope="module")
def plain(trilemma, hearth_path):
    done = trilemma("run", hearth_path, PROMPT, *FEW)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["draft", "lookup", "fixed"])
def test_speculation_writes_the_same_text(trilemma, hearth_path, small, plain, how):
    extra = {"draft": ["--draft", small], "lookup": ["--lookup"], "fixed": ["--draft", small, "--draft-tokens", "3"]}
    done = trilemma("run", hearth_path, PROMPT, *FEW, *extra[how])
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain
    assert "passes of the target" in done.stderr
    assert "14 output tokens" in done.stderr


def test_speculation_states_the_measured_gain(trilemma, hearth_path, small, plain):
    arguments = ["run", hearth_path, PROMPT, *FEW, "--draft", small, "--draft-tokens", "2", "--measure"]
    shown = trilemma(*arguments)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == plain
    assert "measured against plain decoding (9 paired rounds, equal tokens): x" in shown.stderr
    document = json.loads(trilemma(*arguments, "--json").stdout)
    assert document["text"] + "\n" == plain
    found = document["speculation"]
    assert found["draft"] == str(small)
    assert 0 < found["acceptance_rate"] <= 1
    assert found["measured"]["outcome"] in ("gain", "loss", "no clear difference")
    assert found["measured"]["draft_cost_ratio"] > 0


def test_a_cascade_with_a_given_threshold(trilemma, hearth_path, small, plain):
    pair = f"{small},{hearth_path}"
    large = trilemma("run", "--cascade", pair, "--threshold", "1", PROMPT, *FEW)
    assert large.returncode == 0, large.stderr
    assert large.stdout == plain
    assert "answered by the large model" in large.stderr
    kept = json.loads(trilemma("run", "--cascade", pair, "--threshold", "0", PROMPT, *FEW, "--json").stdout)
    assert kept["answered_by"] == "small"
    assert kept["large_s"] == 0
    assert kept["text"] == json.loads(trilemma("run", small, PROMPT, *FEW, "--json").stdout)["text"]


def test_a_cascade_is_calibrated_kept_and_used(trilemma, hearth_path, small, texts_path, tmp_path):
    file = tmp_path / "cascade.json"
    calibrate = ["run", "--cascade", f"{small},{hearth_path}", "--data", texts_path, *FEW[2:], "--max-tokens", "8"]
    calibrate += ["--prompts", "24"]
    done = trilemma(*calibrate, "--limit", "agreement>=70%", "-o", file, PROMPT, "--json", timeout=300)
    assert done.returncode in (0, 3, 4), done.stderr
    document = json.loads(done.stdout)
    record = document["calibration"]
    assert document["answered_by"] in ("small", "large")
    assert set(record["measurements"]) == {"cascade", "small", "large"}
    assert record["measurements"]["large"]["top1_agreement"]["value"] == 1
    energy = record["measurements"]["cascade"]["energy_j_per_answer"]
    assert energy["source"] in ("measured", "estimated")
    assert energy["value"] > 0
    assert record["verdicts"][0]["outcome"] in ("PASS", "INCONCLUSIVE", "FAIL")
    assert json.loads(file.read_text()) == record
    again = trilemma("run", "--cascade", file, PROMPT, *FEW, "--json")
    assert json.loads(again.stdout)["threshold"] == record["rule"]["threshold"]
    assert trilemma(*calibrate, "--limit", "agreement>=70%", "-o", file).returncode == 2  # it is there already
    file.write_text(json.dumps({**record, "small_hash": "0" * 16}))
    changed = trilemma("run", "--cascade", file, PROMPT, *FEW)
    assert changed.returncode == 2
    assert "not the one that" in changed.stderr


def test_an_impossible_limit_ends_with_3(trilemma, hearth_path, small, texts_path, tmp_path):
    done = trilemma("run", "--cascade", f"{small},{hearth_path}", "--data", texts_path, "--limit", "agreement>=100%",
                    "-o", tmp_path / "none.json", "--max-tokens", "8", "--prompts", "16",
                    "--json", timeout=300)  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "No threshold keeps agreement>=100%" in done.stderr
    assert json.loads(done.stdout) == {"calibration": None}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{model}", "hi", "--draft", "{model}", "--lookup"], "Choose one"),
        (["{model}", "hi", "--measure"], "belong to speculation"),
        (["{model}", "hi", "--draft-tokens", "3"], "belong to speculation"),
        (["{model}", "hi", "--lookup", "--runtime", "torch"], "native engine"),
        (["{model}", "hi", "--draft", "nowhere/at/all"], "nowhere/at/all"),
        (["{model}", "hi", "--threshold", "0.5"], "belong to --cascade"),
        (["{model}", "hi", "--cascade", "{model},{model}"], "one too many"),
        (["hi", "--cascade", "{model},{model}"], "No threshold"),
        (["hi", "--cascade", "{model},", "--threshold", "0.5"], "SMALL,LARGE"),
        (["hi", "--cascade", "nothing.json"], "nothing.json"),
        (["hi", "--cascade", "{model},{model}", "--limit", "agreement>=90%"], "both a limit and text"),
        (["hi", "--cascade", "{model},{model}", "--limit", "tpot<=3ms", "--data", "{text}"], "can not steer"),
        (["--cascade", "{model},{model}", "--threshold", "0.5"], "nothing to do"),
        (["{model}"], "a model and a prompt"),
    ],
)
def test_what_can_not_be_is_one_clear_line(trilemma, hearth_path, texts_path, arguments, says):
    done = trilemma("run", *(one.format(model=hearth_path, text=texts_path) for one in arguments))
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


@pytest.mark.shared
def test_a_draft_with_other_tokens_is_refused(trilemma, hearth_path, shared_dir):
    done = trilemma("run", hearth_path, "hi", "--draft", shared_dir / "models" / "stories260K")
    assert done.returncode == 2
    assert "another tokenizer" in done.stderr
