"""Our engines as a model of lm-eval, against its own `hf` model; nothing is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
pytestmark = pytest.mark.filterwarnings("ignore")  # other people's
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'trilemma[eval]')")

QUESTIONS = [
    {"query": "The cat sat on the", "choices": ["mat.", "moon and sang a very long song.", "of"], "gold": 0},
    {"query": "Question: where do fish live?\n", "choices": ["In the sea", "In the tall trees"], "gold": 0},
    {"query": "She opened the door and", "choices": ["went in", "A"], "gold": 1},
]
CONTEXTS = [
    {"context_options": ["The dog barked, so it", "The dog slept, so it"], "continuation": "was loud.", "gold": 0}
]
LAST_WORDS = [{"context": "Once upon a time there was a", "continuation": "little"},
              {"context": "He said that he did not", "continuation": "want to"}]  # fmt: skip


@pytest.fixture(scope="module")
def door():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from trilemma.integrations import lm_eval as found

    return found


@pytest.fixture
def tasks(tmp_path):
    from trilemma.integrations.lm_eval_tasks import write_tasks

    files = {}
    for name, rows in (("questions", QUESTIONS), ("contexts", CONTEXTS), ("words", LAST_WORDS)):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files, write_tasks(files, tmp_path / "tasks"), tmp_path / "tasks"


def run(model, settings, names, folder, **options):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model, model_args=settings, tasks=names, task_manager=manager, bootstrap_iters=0, **options
    )


def requests(found, name):
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [(sample["arguments"], [given[0] for given in sample["resps"]]) for sample in samples]


def test_likelihoods_and_accuracies_are_those_of_the_hf_model(door, tasks, hearth_path):
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")
    _, names, folder = tasks
    ours = run("trilemma", {"path": str(hearth_path), "kv": "f32", "threads": 1}, names, folder)
    theirs = run("hf", {"pretrained": str(hearth_path), "dtype": "float32", "device": "cpu"}, names, folder)
    for name in names:
        assert ours["results"][name]["acc,none"] == theirs["results"][name]["acc,none"]
        for (asked, mine), (same, its) in zip(requests(ours, name), requests(theirs, name), strict=True):
            assert asked == same
            assert [greedy for _, greedy in mine] == [greedy for _, greedy in its]
            assert [nats for nats, _ in mine] == pytest.approx([nats for nats, _ in its], abs=1e-3)
    assert ours["results"][names[0]]["acc_norm,none"] == theirs["results"][names[0]]["acc_norm,none"]


def test_eval_and_lm_eval_count_the_same(door, tasks, hearth_path):
    from trilemma.measure.quality.evaluate import evaluate
    from trilemma.runtime.engine import EngineOptions

    files, names, folder = tasks
    theirs = run("trilemma", f"path={hearth_path},kv=f32,threads=1", names, folder)
    ours = evaluate(hearth_path, tasks=files, options=EngineOptions(threads=1, kv_cache="f32"))
    for row, name in zip(ours.tasks, names, strict=True):
        assert row.measurements[f"accuracy/{row.task}"].value == theirs["results"][name]["acc,none"]
    normed = ours.tasks[0].measurements["accuracy_norm/questions"].value
    assert normed == theirs["results"][names[0]]["acc_norm,none"]


class Asked:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def both(door, hearth_path):
    """(our model, lm-eval's hf model), with a context of 48 tokens."""
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    ours = door.TrilemmaLM(str(hearth_path), kv="f32", threads=1, max_length=48)
    yield ours, HFLM(pretrained=str(hearth_path), dtype="float32", device="cpu", max_length=48)
    ours.close()


def test_single_requests_agree_at_the_edges(both):
    """An empty context, trailing spaces, the prefix token itself, and a text that is cut at the left."""
    ours, theirs = both
    pairs = [
        ("", "Once upon a time"), ("", "<|endoftext|>The end"), ("<|endoftext|>The cat", " sat"), ("It was  ", "late"),
        ("A line\n", "and another"), ("word " * 80, "and the last words"), ("é", "ü and ñ"),
    ]  # fmt: skip
    asked = [Asked(*pair) for pair in pairs]
    mine, its = ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [nats for nats, _ in mine] == pytest.approx([nats for nats, _ in its], abs=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in its]


def test_rolling_likelihoods_agree(both, texts_path):
    ours, theirs = both
    text = texts_path.read_text(encoding="utf-8")
    asked = [Asked(piece) for piece in (text[:20], text[:700], text[1000:1400])]
    mine, its = ours.loglikelihood_rolling(asked, disable_tqdm=True), theirs.loglikelihood_rolling(asked)
    assert mine == pytest.approx(its, abs=1e-2, rel=1e-5)


def test_answers_agree_and_stop(both):
    ours, theirs = both
    kinds = [{"until": ["."], "max_gen_toks": 16}, {"until": ["\n", " the"], "max_gen_toks": 12, "do_sample": False}]
    for settings in kinds:
        asked = [Asked(prompt, dict(settings)) for prompt in ("Once upon a time", "The old king " * 20)]
        mine = ours.generate_until(asked, disable_tqdm=True)
        assert mine == theirs.generate_until(asked, disable_tqdm=True)
        assert not any(stop in text for text in mine for stop in settings["until"])


def test_what_can_not_be_asked_is_refused(both, door):
    from trilemma.core.errors import InputError

    ours, _ = both
    with pytest.raises(InputError, match="does not fit"):
        ours.generate_until([Asked("The", {"max_gen_toks": 48})], disable_tqdm=True)
    with pytest.raises(InputError, match="does not fit"):
        ours.loglikelihood([Asked("The", " word" * 60)], disable_tqdm=True)
    with pytest.raises(InputError, match="no model"):
        door.TrilemmaLM()


@pytest.mark.slow  # lm-eval reads its thousands of own tasks
def test_the_command_line_is_that_of_lm_eval(door, tasks, hearth_path, tmp_path):
    _, names, folder = tasks
    done = subprocess.run(
        [sys.executable, "-m", "trilemma.integrations.lm_eval", "run", "--model", "trilemma", "--model_args",
         f"path={hearth_path},kv=f32,threads=1", "--include_path", str(folder), "--tasks", names[2], "--limit", "1",
         "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "local_words" in done.stdout
    assert list((tmp_path / "out").rglob("results_*.json"))
