"""Every family on the command line: inspected, compressed and run, from a small random checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from family_cases import CASES
from trilemma.cli.main import app

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ["qwen3", "gemma3", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe normalized, dense layers"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def words_tokenizer(vocab: int) -> str:
    """A tokenizer.json whose tokens are words 'w3', 'w4', ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str()


def ask(*arguments: object) -> dict:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", FAMILIES)
def test_inspect_compress_and_run(case, save_hf, tmp_path):
    kind, options = CASES[case]
    theirs, folder = save_hf(kind, **options)
    (folder / "tokenizer.json").write_text(words_tokenizer(113))
    seen = ask("inspect", folder)
    own = {id(p): p.numel() for p in theirs.parameters()}  # tied ones once
    assert seen["parameters"] == sum(own.values())
    assert (seen["active_parameters"] < seen["parameters"]) == ("mixtral" in case or "moe" in case)
    made = ask("compress", folder, "-o", tmp_path / "w8", "--scheme", "W8A8-g32", "--threads", "1")
    assert made["weights_bytes"] < made["original_weights_bytes"]
    assert ask("inspect", tmp_path / "w8")["parameters"] == seen["parameters"]
    prompt = "w5 w17 w99 w23"
    for model in (folder, tmp_path / "w8"):
        answer = ask("run", model, prompt, "--runtime", "torch", "--max-tokens", "5", "--threads", "1")
        assert answer["output_tokens"] <= 5


def test_the_answer_is_that_of_transformers(save_hf):
    theirs, folder = save_hf("Qwen3", **CASES["qwen3"][1])
    (folder / "tokenizer.json").write_text(words_tokenizer(113))
    answer = ask("run", folder, "w5 w17 w99", "--runtime", "torch", "--max-tokens", "6", "--kv", "f32")
    with torch.no_grad():
        ids = theirs.generate(torch.tensor([[5, 17, 99]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    if 2 in ids:  # the end token is not part of the text
        ids = ids[: ids.index(2)]
    assert answer["text"].split() == [f"w{i}" for i in ids]
