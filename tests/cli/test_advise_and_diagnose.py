"""`advise`, `inspect --diagnose` and `inspect --waterfall` as a user runs them."""

from __future__ import annotations

import json

import pytest
import yaml

QUICK = ["--prompt", "16", "--output", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def scenarios(repository):
    return repository / "examples" / "scenarios"


def test_advise_ranks_and_exits_by_what_is_feasible(trilemma, scenarios, tmp_path):
    done = trilemma("advise", scenarios / "two-equal-models.yaml", "--plot", tmp_path / "cost.svg")
    assert done.returncode == 0, done.stderr
    assert "quality being equal" in done.stdout
    assert "What would change the winner" in done.stdout
    assert (tmp_path / "cost.svg").read_text().startswith("<svg")
    data = yaml.safe_load((scenarios / "two-equal-models.yaml").read_text())
    data["workload"]["least_quality"] = 0.99
    for candidate in data["candidates"]:
        candidate["model"] = str(scenarios / candidate["model"])
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(data))
    done = trilemma("advise", tmp_path / "none.yaml", "--json")
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert found["winner"] is None
    assert found["strategies"][0]["failures"][0]["constraint"] == "quality"


def test_advise_refuses_what_it_can_not_read(trilemma, tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\nworkload: {}\ncandidates: []\n")
    done = trilemma("advise", tmp_path / "bad.yaml")
    assert done.returncode == 2
    assert "workload.requests_per_day" in done.stderr
    assert trilemma("advise", tmp_path / "none.yaml").returncode == 2
    done = trilemma("advise", tmp_path / "bad.yaml", "--plot", tmp_path / "x.png")
    assert done.returncode == 2
    assert ".svg" in done.stderr


def test_diagnose_as_json(trilemma, hearth_path):
    done = trilemma("inspect", hearth_path, "--diagnose", "--complaint", "hungry", "--json", *QUICK)
    found = json.loads(done.stdout)
    assert found["complaint"] == "hungry"
    assert {phase["bound"] for phase in found["phases"]} <= {"memory", "compute", "overhead"}


def test_diagnose_of_a_gguf_file(trilemma, hearth_path, tmp_path):
    assert trilemma("compress", hearth_path, "-o", tmp_path / "w4", "--scheme", "W4A8-g32").returncode == 0
    assert trilemma("export", tmp_path / "w4", "-o", tmp_path / "w4.gguf").returncode == 0
    done = trilemma("inspect", tmp_path / "w4.gguf", "--diagnose", *QUICK)
    assert done.returncode == 0, done.stderr
    wanted = ("Q4_0 as int4-g32", "decode is", "prefill is", "Remedies: model structure", "Remedies: decoding",
              "Remedies: system", "MODEL in the commands")  # fmt: skip
    for words in wanted:
        assert words in done.stdout
    damaged = (tmp_path / "w4.gguf").read_bytes()[:5000]
    (tmp_path / "cut.gguf").write_bytes(damaged)
    done = trilemma("inspect", tmp_path / "cut.gguf", "--diagnose", *QUICK)
    assert done.returncode == 2
    assert "damaged" in done.stderr


def test_waterfall_table_and_picture(trilemma, hearth_path, tmp_path):
    done = trilemma("inspect", hearth_path, "--waterfall", "W8A8-g32-kv8", "--plot", tmp_path / "steps.svg", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "kv-cache int8" in done.stdout
    assert "another order could share" in done.stdout
    assert (tmp_path / "steps.svg").read_text().startswith("<svg")
    assert trilemma("inspect", hearth_path, "--waterfall", "W4A8-g32-gptq").returncode == 2
    assert trilemma("inspect", hearth_path, "--waterfall", "W8A8", "--diagnose").returncode == 2
