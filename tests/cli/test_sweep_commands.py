"""`bench` as a sweep and `eval` by domain, as a user runs them: forms, plots, records, refusals."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ElementTree

import pytest
from typer.testing import CliRunner

from trilemma.cli.main import app
from trilemma.core.errors import TrilemmaError

FEW = ["--repetitions", "2", "--threads", "1"]


def test_cache_policies_over_depths(trilemma, hearth_path, tmp_path):
    plot, record = tmp_path / "kv.svg", tmp_path / "kv.json"
    done = trilemma(
        "bench", hearth_path, "--kv", "none,int8", "--kv", "bf16", "--context", "4,32", *FEW, "--memory", "13.8MB",
        "--device", "raspberry-pi-5", "--plot", plot, "--save", record,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| hearth-7m")]
    assert len(table) == 6
    assert "none (recompute)" in done.stdout
    assert "within 13.8 MB, weights included: recompute holds" in done.stdout
    assert "on raspberry-pi-5 (estimated): cache int8 is faster than recompute from" in done.stdout
    words = [element.text for element in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert {"recompute", "cache, int8", "cache, bf16"} <= set(words)
    assert len(json.loads(record.read_text())["rows"]) == 6
    page = trilemma("report", record, "-o", tmp_path / "kv.html")
    assert page.returncode == 0, page.stderr


def test_lengths_threads_and_runtimes_are_crossed(trilemma, hearth_path, tmp_path):
    plot = tmp_path / "prompt.svg"
    lists = ["--prompt", "4,9", "--output", "3", "--threads", "1,2", "--runtime", "native,torch"]
    done = trilemma("bench", hearth_path, *lists, "--repetitions", "2", "--plot", plot, "-o", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["trial"]["name"] for row in report["rows"]] == [
        f"bf16 {threads} {runtime} prompt {prompt}"
        for threads in ("1 thread", "2 threads") for runtime in ("native", "torch") for prompt in (4, 9)
    ]  # fmt: skip
    paired = [note for note in report["notes"] if "against bf16 1 thread native, prompt 9" in note]
    assert [note.split(" against")[0] for note in paired] == [
        f"hearth-7m bf16 {words}" for words in ("1 thread torch", "2 threads native", "2 threads torch")
    ]
    measured = report["rows"][1]["trial"]["measurements"]
    assert measured["ttft_s"]["conditions"]["prompt_tokens"] == 9
    assert measured["prefill_tokens_per_s"]["conditions"]["compute_share"] > 0
    assert measured["engine_memory_bytes"]["conditions"]["context"] == 12
    words = [element.text for element in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert "bf16 2 threads torch" in words


def test_threads_have_a_picture_and_a_table_of_their_own(trilemma, hearth_path, tmp_path):
    plot = tmp_path / "threads.svg"
    few = ["--prompt", "4", "--output", "3", "--repetitions", "2", "--peak-memory"]
    done = trilemma("bench", hearth_path, "--threads", "2,1", *few, "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert "| prefill of arithmetic | decode of bandwidth |" in done.stdout
    assert "| peak_memory_bytes |" in done.stdout
    assert "peak_memory_bytes: " not in done.stdout  # a reason
    assert "threads: 2, 1" in done.stdout
    words = [element.text for element in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert {"Decode", "Prefill", "bf16"} <= set(words)
    csv_form = trilemma("bench", hearth_path, "--threads", "1", *few[:-1], "-o", "csv")
    (prefill,) = [
        row for row in csv.DictReader(io.StringIO(csv_form.stdout)) if row["metric"] == "prefill_tokens_per_s"
    ]
    assert (prefill["runtime"], prefill["threads"], prefill["prompt_tokens"]) == ("native", "1", "4")
    assert float(prefill["share"]) > 0
    in_process = trilemma("bench", hearth_path, "--scheme", "W8A8", "--threads", "1", *few)
    assert "W8A8: peak_memory_bytes: this form exists in this process alone" in in_process.stdout


def test_prefill_up_to_each_depth(trilemma, hearth_path):
    done = trilemma("bench", hearth_path, "--context", "4,8", "--kv", "bf16", "--threads", "1,2", "--prefill",
                    "--repetitions", "2", "-o", "json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["trial"]["name"] for row in rows] == [
        f"bf16 {threads} kv-bf16 at {depth}" for threads in ("1 thread", "2 threads") for depth in (4, 8)
    ]
    first = rows[1]["trial"]["measurements"]["ttft_s"]
    assert (first["n"], first["conditions"]["prompt_tokens"]) == (2, 8)


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_batches_in_every_form(trilemma, hearth_path, tmp_path, form):
    plot = tmp_path / "batch.svg"
    lengths = ["--prompt", "6", "--output", "3"]
    done = trilemma("bench", hearth_path, "--batch", "1,2", *lengths, *FEW, "-o", form, "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert plot.read_text().startswith("<svg")
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
        assert {row["batch"] for row in rows} == {"1", "2"}
        assert "throughput_tokens_per_s" in {row["metric"] for row in rows}
        gaps = [row for row in rows if row["metric"] == "itl_s"]
        assert all(float(row["share"]) > 0 for row in gaps)
    elif form == "json":
        assert len(json.loads(done.stdout)["rows"]) == 2
    else:
        assert [json.loads(line)["trial"]["name"] for line in done.stdout.splitlines()] == ["bf16 x1", "bf16 x2"]


def test_domains_in_one_table(trilemma, hearth_path, texts_path, repository, tmp_path):
    plot, record = tmp_path / "domains.svg", tmp_path / "domains.json"
    domains = ["--domain", f"kids={texts_path}", "--domain", f"docs={repository / 'docs' / 'log.md'}"]
    short = ["--max-tokens", "600", "--context", "64", "--threads", "1"]
    done = trilemma("eval", hearth_path, hearth_path, "--against", hearth_path, *domains, *short, "-o", "md",
                    "--plot", plot, "--save", record)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines() if " hearth-7m " in line]
    assert rows == ["| all", "| all", "| kids", "| kids", "| docs", "| docs"]
    assert len(json.loads(record.read_text())) == 2
    assert "docs" in plot.read_text()
    alone = trilemma("eval", hearth_path, *domains, *short, "-o", "csv")
    found = list(csv.DictReader(io.StringIO(alone.stdout)))
    assert {row["domain"] for row in found} == {"all", "kids", "docs"}
    assert {row["metric"] for row in found} == {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["bench", "{hearth}", "--context", "1024"], "longer than the 512"),
        (["bench", "{hearth}", "--context", "4", "--kv", "fp8"], "Unknown KV cache 'fp8'"),
        (["bench", "{hearth}", "--batch", "0"], "not '0'"),
        (["bench", "{hearth}", "--batch", "2", "--prompt", "600"], "632 tokens"),
        (["bench", "{hearth}", "--batch", "2", "--context", "4"], "two sweeps"),
        (["bench", "{hearth}", "--context", "4", "--prompt", "4"], "no meaning"),
        (["bench", "{hearth}", "--context", "4", "--runtime", "native,torch"], "one value of --runtime"),
        (["bench", "{hearth}", "--batch", "2", "--prompt", "4,8"], "one value of --prompt"),
        (["bench", "{hearth}", "--batch", "2", "--peak-memory"], "--peak-memory has no meaning with --batch"),
        (["bench", "{hearth}", "--prefill"], "give --context"),
        (["bench", "{hearth}", "--prompt", "some"], "not 'some'"),
        (["bench", "{hearth}", "--threads", "0"], "not '0'"),
        (["bench", "{hearth}", "--runtime", "native,vllm"], "Unknown engine 'vllm'"),
        (["bench", "{hearth}", "--time", "soon"], "time 'soon'"),
        (["bench", "{hearth}", "--prompt", "8,600"], "do not fit the context"),
        (["bench", "{hearth}", "--context", "4", "--memory", "50%"], "64MB"),
        (["bench", "{hearth}", "--context", "4", "--device", "toaster"], "toaster"),
        (["bench", "{hearth}", "--plot", "{tmp}/a.svg"], "needs a sweep"),
        (["bench", "{hearth}", "--batch", "1", "--plot", "{tmp}/a.png"], ".svg"),
        (["bench", "{hearth}", "--batch", "1", "--save", "{tmp}/nowhere/a.json"], "does not exist"),
        (["eval", "{hearth}", "--domain", "children.txt"], "name=file"),
        (["eval", "{hearth}"], "--domain"),
    ],
)
def test_refusals(hearth_path, tmp_path, command, words):
    """In this process: what turns an error into its exit code and one line is tested in test_main."""
    done = CliRunner().invoke(app, [part.format(hearth=hearth_path, tmp=tmp_path) for part in command])
    assert isinstance(done.exception, TrilemmaError)
    assert done.exception.exit_code == 2
    assert words in str(done.exception)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
