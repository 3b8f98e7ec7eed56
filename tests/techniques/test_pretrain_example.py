"""examples/pretrain.py on a tiny model: the loss falls, a kill costs nothing, its folder is a real checkpoint."""

from __future__ import annotations

import functools
import importlib
import json
import lzma
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from trilemma.core.errors import DataError, InputError, StoppedError
from trilemma.model.checkpoint import read_checkpoint
from trilemma.model.decoder import Decoder
from trilemma.model.tokenizer import Tokenizer
from trilemma.techniques.training import STATE_FILE, read_curve

OPTIONS: dict[str, Any] = {
    "dim": 40, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 56, "vocab": 400, "context": 32, "steps": 120, "batch": 4,
    "learning_rate": 0.01, "checkpoint_every": 5, "threads": 1, "seed": 3, "text_mb": 0.2, "tokenizer_mb": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def pretrain(repository: Path) -> Iterator[Callable[..., None]]:
    """The script's main function, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "examples"))
        patch.setenv("RAYON_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        yield functools.partial(importlib.import_module("pretrain").main, **OPTIONS)
        torch.set_num_threads(threads)


def start(repository: Path, text: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    """The script in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "RAYON_NUM_THREADS": "1", "COLUMNS": "200"}
    options = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [
        sys.executable,
        str(repository / "examples" / "pretrain.py"),
        "--text",
        str(text),
        "--output",
        str(output),
    ]
    return subprocess.Popen([*command, *options, *more], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def text(texts_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    packed = tmp_path_factory.mktemp("text") / "children.txt.xz"
    packed.write_bytes(lzma.compress(texts_path.read_bytes()[:400_000], preset=0))
    return packed


@pytest.fixture(scope="module")
def trained(pretrain: Callable[..., None], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "tiny"
    pretrain(text=[text], output=output)
    return output


def test_the_loss_falls(trained: Path):
    curve = read_curve(trained)
    measured = [point.validation_loss for point in curve if point.validation_loss is not None]
    assert abs(measured[0] - np.log(400)) < 0.2  # untrained
    assert measured[-1] < measured[0] - 1
    assert curve[-1].step == 120


def test_a_killed_run_ends_in_the_same_weights(
    repository: Path, pretrain: Callable[..., None], text: Path, trained: Path, tmp_path: Path
):
    output, work = tmp_path / "tiny", tmp_path / "tiny.training"
    with start(repository, text, output) as process:
        deadline = time.monotonic() + 60
        while not (work / STATE_FILE).exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert read_curve(work)[-1].step < 120
    assert not output.exists()
    pretrain(text=[text], output=output)
    assert (output / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_ctrl_c_keeps_a_checkpoint(pretrain: Callable[..., None], text: Path, tmp_path: Path):
    work = tmp_path / "tiny.training"

    def interrupt_when_trained_a_while() -> None:
        while not (work / STATE_FILE).exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_trained_a_while).start()
    with pytest.raises(StoppedError, match=r"Stopped at step \d+ of 9000; the same command goes on"):
        pretrain(text=[text], output=tmp_path / "tiny", steps=9000)
    assert not (tmp_path / "tiny").exists()


def test_the_folder_is_a_checkpoint(trained: Path):
    transformers = pytest.importorskip("transformers")
    model = read_checkpoint(trained)
    tokenizer = Tokenizer.load(trained)
    ids = tokenizer.encode("“Once upon a time”, said the naïve fox — and laughed.")
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "“Once upon a time”, said the naïve fox — and laughed."
    tokens = torch.tensor([ids[:32]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    loaded = transformers.AutoTokenizer.from_pretrained(trained)
    assert loaded("“Once upon a time”, said the naïve fox — and laughed.")["input_ids"] == ids
    with torch.no_grad():
        ours = Decoder.from_model(model).eval()(tokens)
        assert (ours - theirs(tokens).logits).abs().max() < 1e-4
    assert ours.abs().max() > 1


def test_curve_and_card(trained: Path):
    picture = ElementTree.fromstring((trained / "learning_curve.svg").read_text(encoding="utf-8"))
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 2
    card = (trained / "README.md").read_text(encoding="utf-8")
    final = read_curve(trained)[-1].validation_loss
    assert f"{final:.3f} nats a token" in card
    assert "nan" not in card
    facts = json.loads((trained.with_name("tiny.training") / "tokens.json").read_text())
    assert f"{final / np.log(2) * facts['tokens'] / facts['text_bytes']:.3f}" in card


def test_tokens_are_those_of_the_prepared_text(trained: Path, texts_path: Path):
    from trilemma.data.documents import prepare_text

    work = trained.with_name("tiny.training")
    tokenizer = Tokenizer.load(work)
    ids = np.fromfile(work / "tokens.bin", dtype=np.uint16)
    first = texts_path.read_text(encoding="utf-8").split("<|endoftext|>")[0]
    expected = tokenizer.encode_plain(prepare_text(first, "book"))
    assert ids[: len(expected) + 1].tolist() == [*expected, 0]


def test_it_writes_again_to_its_own_folder_only(
    pretrain: Callable[..., None], text: Path, trained: Path, tmp_path: Path
):
    before = (trained / "model.safetensors").read_bytes()
    pretrain(text=[text], output=trained)  # finished: nothing is trained, all is written again
    assert (trained / "model.safetensors").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not made by this script"):
        pretrain(text=[text], output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_bad_text(pretrain: Callable[..., None], tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        pretrain(text=[tmp_path / "absent.txt"], output=tmp_path / "out")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1") * 99)
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(os.urandom(9999))[:5000])
    for name in ("latin.txt", "cut.txt.xz"):
        with pytest.raises(DataError, match=name):
            pretrain(text=[tmp_path / name], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_options_exit_with_2(repository: Path, text: Path, tmp_path: Path):
    with start(repository, text, tmp_path / "out", "--optimizer", "sgd") as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "'adamw', 'muon' or 'sign'" in said
    assert list(tmp_path.iterdir()) == []


def test_time_sets_the_steps_once(pretrain: Callable[..., None], text: Path, tmp_path: Path):
    pretrain(text=[text], output=tmp_path / "tiny", time="0.7s")
    plan = json.loads((tmp_path / "tiny.training" / "plan.json").read_text())
    curve = read_curve(tmp_path / "tiny")
    assert curve[-1].step == plan["steps"]
    assert 0.05 < curve[-1].seconds < 20
    with pytest.raises(InputError, match="90s, 55m or 1h"):
        pretrain(text=[text], output=tmp_path / "other", time="soon")
