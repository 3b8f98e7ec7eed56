"""`trilemma eval` with tasks, answers and protocols, in every form of output."""

from __future__ import annotations

import csv
import io
import json

import pytest

SHORT = ["--max-tokens", "600", "--context", "64", "--threads", "1"]


@pytest.fixture
def task(tmp_path):
    rows = [{"query": "The king sat on his", "choices": ["throne.", "of of the."], "gold": 0}] * 3
    path = tmp_path / "kings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tables_of_texts_tasks_and_answers(trilemma, hearth_path, texts_path, task, tmp_path):
    asked = ["eval", hearth_path, "--against", hearth_path, "--data", texts_path, *SHORT, "--stride", "32",
             "--task", f"kings={task}", "--generate", "3", "--answer-tokens", "8"]  # fmt: skip
    table = trilemma(*asked, "-o", "md")
    assert table.returncode == 0, table.stderr
    assert "Context 64, stride 32; 95% intervals over documents." in table.stdout
    assert "| kings | 3 | 100.0% [" in table.stdout
    assert table.stdout.count("intervals over") == 3
    assert "changed_answers" in table.stdout
    record = tmp_path / "record.json"
    rows = list(csv.DictReader(io.StringIO(trilemma(*asked, "-o", "csv", "--save", record).stdout)))
    values = {(row["domain"], row["metric"]): row["value"] for row in rows}
    assert values["kings", "accuracy/kings"] == "1.0"
    assert values["answers", "changed_answers"] == "0.0"
    assert ("children", "word_perplexity") in values
    assert json.loads(record.read_text())["generation"]["answers"][0]["first_difference"] is None


def test_a_task_needs_no_text(trilemma, hearth_path, task):
    done = trilemma("eval", hearth_path, "--task", f"kings={task}", "--limit-items", "2", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "kings" in done.stdout
    assert "accuracy_norm" in done.stdout


def test_the_protocol_of_llama_cpp(trilemma, hearth_path, texts_path):
    done = trilemma("eval", hearth_path, "--data", texts_path, *SHORT, "--protocol", "llama.cpp", "-o", "md")
    assert done.returncode == 0, done.stderr
    assert "| domain | windows |" in done.stdout
    assert "llama.cpp's protocol; 95% intervals over windows" in done.stdout


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([], "text or tasks"),
        (["--task", "kings"], "name=file"),
        (["--task", "a={task}", "--task", "a={task}"], "given twice"),
        (["--task", "a=nowhere.jsonl"], "does not exist"),
        (["--task", "a={task}", "--plot", "x.svg"], "by domain"),
        (["--data", "{texts}", "--limit-items", "2"], "no meaning without --task"),
        (["--data", "{texts}", "--stride", "600"], "stride of 600"),
        (["--data", "{texts}", "--generate", "2", "--answer-tokens", "300"], "at most half"),
    ],
)
def test_bad_input_is_one_line(trilemma, hearth_path, texts_path, task, extra, words):
    given = [item.replace("{task}", str(task)).replace("{texts}", str(texts_path)) for item in extra]
    done = trilemma("eval", hearth_path, *given)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
