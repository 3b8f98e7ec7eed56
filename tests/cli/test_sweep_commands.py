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
