"""Each command does its job on the shipped model; `--json` prints one document and nothing else on stdout."""

from __future__ import annotations

import csv
import io
import json

import pytest

SMALL = ["--max-tokens", "3000", "--context", "128"]


@pytest.fixture(scope="module")
def artifact(hearth_path, trilemma, tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "w8"
    done = trilemma("compress", hearth_path, "-o", folder, "--scheme", "W8A8-g32", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["weights_bytes"] < 0.6 * result["original_weights_bytes"]
    return folder


def document(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_inspect_reads_headers_only(trilemma, shapes_path, hearth_path):
    shape = document(trilemma("inspect", shapes_path / "Llama-3.2-1B", "--json"))
    assert shape["parameters"] == 1_235_814_400
    assert shape["random"] is True
    real = document(trilemma("inspect", hearth_path, "--json"))
    assert real["random"] is False
    assert real["parameters"] == 6_819_072
    assert real["weights_bytes_in"]["f32"] == 4 * real["parameters"]
    text = trilemma("inspect", shapes_path / "Qwen2.5-0.5B").stdout
    assert "494,032,768" in text
    assert "random weights: cost only" in text


def test_run_streams_text_and_keeps_figures_apart(trilemma, artifact):
    done = trilemma("run", artifact, "Once upon a time", "--max-tokens", "12")
    assert done.returncode == 0, done.stderr
    answer = document(trilemma("run", artifact, "Once upon a time", "--max-tokens", "12", "--json"))
    assert done.stdout == answer["text"] + "\n"
    assert "12 output tokens" in done.stderr
    assert "ttft" in done.stderr
    assert answer["output_tokens"] == 12
    assert answer["ttft_s"] > 0


def test_run_options_reach_the_engine(trilemma, artifact):
    def text(*arguments):
        return document(trilemma("run", artifact, "The cat", "--max-tokens", "16", "--json", *arguments))

    warm = ["--temperature", "1.5", "--top-k", "200"]
    assert text(*warm, "--seed", "1")["text"] == text(*warm, "--seed", "1")["text"]
    assert text(*warm, "--seed", "1")["text"] != text(*warm, "--seed", "2")["text"]
    assert text("--repetition-penalty", "1.8")["text"] != text()["text"]
    whole = text()["text"]
    assert text("--stop", whole[8:12])["text"] == whole[: whole.index(whole[8:12])]
    for isa in ("scalar", "avx2"):
        done = trilemma("run", artifact, "The cat", "--max-tokens", "16", "--json", "--isa", isa, "--threads", "1")
        assert done.returncode == 2 or json.loads(done.stdout)["text"] == whole
    assert (
        document(trilemma("run", artifact, "The cat", "--max-tokens", "4", "--kv", "none", "--json"))["output_tokens"]
        == 4
    )


def test_a_recipe_replayed_gives_the_same_bytes(trilemma, artifact, hearth_path, tmp_path):
    done = trilemma("compress", hearth_path, "-o", tmp_path / "again", "--recipe", artifact / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    for path in artifact.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_eval_with_and_without_a_reference(trilemma, artifact, hearth_path, texts_path):
    alone = document(trilemma("eval", artifact, "--data", texts_path, *SMALL, "--json"))
    (row,) = alone["rows"]
    likelihoods = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert set(row["measurements"]) == likelihoods
    paired = document(
        trilemma("eval", artifact, "--data", f"kids={texts_path}", "--reference", hearth_path, *SMALL, "--json")
    )
    (row,) = paired["rows"]
    assert row["domain"] == "kids"
    low, high = row["measurements"]["ppl_increase"]["ci95"]
    assert low <= row["measurements"]["ppl_increase"]["value"] <= high
    assert 0 < row["measurements"]["kl_mean"]["value"] < 0.01
    shown = trilemma("eval", artifact, "--data", texts_path, *SMALL).stdout
    assert "perplexity" in shown
    assert "[" in shown


def test_compare_pairs_with_the_first(trilemma, artifact, hearth_path, texts_path):
    few = ["--repetitions", "2", "--prompt", "8", "--output", "4"]
    found = document(trilemma("compare", hearth_path, artifact, "--data", texts_path, *SMALL, *few, "--json"))
    first, second = found["rows"]
    assert first["relative"]["weights_bytes"][0] == 1
    assert second["relative"]["weights_bytes"][0] == pytest.approx(0.53, abs=0.02)
    table = trilemma("compare", hearth_path, artifact, *few).stdout
    assert "weights_bytes" in table
    assert "perplexity" not in table


@pytest.mark.parametrize("form", ["md", "csv", "json", "jsonl"])
def test_bench_in_every_form(trilemma, shapes_path, form, artifact):
    few = ["--repetitions", "2", "--prompt", "8", "--output", "4"]
    done = trilemma("bench", artifact, shapes_path / "SmolLM2-135M", "--scheme", "W4A8-g128", *few, "-o", form)
    assert done.returncode == 0, done.stderr
    if form == "md":
        assert "SmolLM2-135M (134.5M, *)" in done.stdout
        assert "random weights: cost only" in done.stdout
        assert "perplexity" not in done.stdout
    elif form == "csv":
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
        assert {row["random_weights"] for row in rows} == {"True", "False"}
        assert {row["form"] for row in rows} == {"W4A8-g128"}
    elif form == "json":
        assert json.loads(done.stdout)["panel"] == "cost"
    else:
        assert [json.loads(line)["model"] for line in done.stdout.splitlines()] == ["w8", "SmolLM2-135M"]


def test_export_and_refusal_to_overwrite(trilemma, artifact, tmp_path):
    target = tmp_path / "model.gguf"
    found = document(trilemma("export", artifact, "-o", target, "--json"))
    assert found["bytes"] == target.stat().st_size
    assert target.read_bytes()[:4] == b"GGUF"
    assert trilemma("export", artifact, "-o", target).returncode == 2
    assert trilemma("export", artifact, "-o", target, "--force").returncode == 0


def test_list_names_every_table(trilemma):
    tables = document(trilemma("list", "--json"))
    kinds = {"techniques", "formats", "schemes", "devices", "families", "engines", "exporters", "metrics", "sensors"}
    assert kinds == set(tables)
    assert all(tables.values())
    assert "gptq" in tables["techniques"]
    assert "gguf" in tables["exporters"]
    assert list(document(trilemma("list", "metrics", "--json"))) == ["metrics"]


def test_report_of_a_bench_is_a_page_without_quality(trilemma, artifact, tmp_path):
    few = ["--repetitions", "2", "--prompt", "8", "--output", "4"]
    assert trilemma("bench", artifact, *few, "--save", tmp_path / "cost.json").returncode == 0
    done = trilemma("report", tmp_path / "cost.json", "-o", tmp_path / "cost.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "cost.html").read_text()
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    (tmp_path / "notes.txt").write_text("mine")
    assert trilemma("report", tmp_path / "cost.json", "-o", tmp_path / "notes.txt").returncode == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"
