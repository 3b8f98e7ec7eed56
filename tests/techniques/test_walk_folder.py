"""The work folder of a walk over the layers: a run that was killed goes on in it and ends in the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from trilemma.core.errors import CheckpointError, OutputError
from trilemma.model.model import Model
from trilemma.model.write import write_checkpoint
from trilemma.techniques.apply import apply_recipe, compress
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.states import States
from trilemma.techniques.technique import Build

GUIDED = "W4A8-g32-guided"
SCHEMES = ("W4A8-g32-gptq", "W4A8-g32-gptaq", GUIDED, "awq+W4A8-g32-gptq", "smooth+W4A8-g32-gptaq+scales2")
KILLED = """
import os, signal, sys
import numpy as np
from trilemma.techniques.apply import compress

model, output, scheme, text, moment = sys.argv[1:]
count = 0

def tell(done, total, what):
    global count
    count += 1
    if count == int(moment):
        os.kill(os.getpid(), signal.SIGKILL)

compress(model, output, scheme=scheme, calibration=np.load(text), threads=1, progress=tell)
"""


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


class Stop(BaseException):
    """As Ctrl-C is: no ordinary exception."""


def stopping_at(moment: int):
    told = 0

    def tell(done: int, total: int, what: str) -> None:
        nonlocal told
        told += 1
        if told == moment:
            raise Stop

    return tell


@pytest.fixture
def model(tiny_model) -> Model:
    return tiny_model(seed=5, layers=3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_a_work_folder_the_bits_are_those_of_memory_alone(model, tokens, tmp_path, scheme):
    kept = Build(calibration=tokens, threads=2, work=tmp_path / "work")
    one = apply_recipe(model, scheme_to_recipe(scheme), kept)
    other = apply_recipe(model, scheme_to_recipe(scheme), Build(calibration=tokens, threads=2))
    assert list((tmp_path / "work").glob("layers-*/layer-2.json"))
    for name in other:
        assert np.array_equal(one.tensor(name), other.tensor(name)), name
        assert one.format_of(name) == other.format_of(name)
        assert one.linear(name) == other.linear(name)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if not scheme.startswith("awq")])
def test_stopped_at_any_word_of_its_progress_the_same_call_ends_in_the_same_bytes(model, tokens, tmp_path, scheme):
    said: list[str] = []
    compress(model, tmp_path / "whole", scheme=scheme, calibration=tokens, threads=1,
             progress=lambda done, total, what: said.append(what))  # fmt: skip
    whole = digests(tmp_path / "whole")
    output = tmp_path / "stopped"
    for moment in np.linspace(2, len(said), 4).astype(int):
        with pytest.raises(Stop):
            compress(model, output, scheme=scheme, calibration=tokens, threads=1, progress=stopping_at(moment))
        assert not output.exists()
        again: list[str] = []
        compress(model, output, scheme=scheme, calibration=tokens, threads=1,
                 progress=lambda done, total, what, again=again: again.append(what))  # fmt: skip
        assert digests(output) == whole
        assert not (tmp_path / "stopped.work").exists()
        if moment > 0.8 * len(said):
            assert not any(what.startswith("layer 0: choosing") for what in again)
        for path in output.iterdir():
            path.unlink()
        output.rmdir()


def test_killed_twice_the_same_call_ends_in_the_same_bytes(tiny_model, tokens, tmp_path, random_generator):
    model, text = write_checkpoint(tiny_model(layers=4), tmp_path / "model"), tmp_path / "text.npy"
    np.save(text, tokens)
    output = tmp_path / "killed"
    for moment in random_generator.integers(2, 9, 2):
        arguments = [str(model), str(output), GUIDED, str(text), str(moment)]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, timeout=600)
        assert done.returncode == -signal.SIGKILL
        assert not output.exists()
    compress(model, output, scheme=GUIDED, calibration=tokens, threads=1)
    compress(model, tmp_path / "whole", scheme=GUIDED, calibration=tokens, threads=1)
    assert digests(output) == digests(tmp_path / "whole")


def stopped(model: Model, tokens, output: Path, scheme: str = "W4A8-g32-gptq", seed: int = 0) -> None:
    """Leaves a work folder with a finished layer."""

    def tell(done: int, total: int, what: str) -> None:
        if what.startswith("layer 1: choosing"):
            raise Stop

    with pytest.raises(Stop):
        compress(model, output, scheme=scheme, calibration=tokens, threads=1, seed=seed, progress=tell)


def test_what_another_job_left_is_not_used(model, tiny_model, tokens, tmp_path):
    jobs = {
        "text": (model, np.roll(tokens, 1), "W4A8-g32-gptq", 0),
        "model": (tiny_model(seed=6, layers=3), tokens, "W4A8-g32-gptq", 0),
        "recipe": (model, tokens, "W4A8-g64-gptq", 0),
        "seed": (model, tokens, "W4A8-g32-gptq", 1),
    }
    for what, (other, text, scheme, seed) in jobs.items():
        output = tmp_path / what
        stopped(model, tokens, output)
        said: list[str] = []
        compress(other, output, scheme=scheme, calibration=text, threads=1, seed=seed,
                 progress=lambda done, total, what, said=said: said.append(what))  # fmt: skip
        assert "layer 0: choosing codes" in said, what
        compress(other, tmp_path / f"{what}-whole", scheme=scheme, calibration=text, threads=1, seed=seed)
        assert digests(output) == digests(tmp_path / f"{what}-whole"), what


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *product(["hidden-*.f32", "layer-0.safetensors", "ends.safetensors"], ["cut", "changed"]),
        ("layer-0.json", "cut"),
    ],
)
def test_a_damaged_work_folder_is_noticed_and_named(model, tokens, tmp_path, file, damage):
    output = tmp_path / "out"
    stopped(model, tokens, output)
    (path,) = (tmp_path / "out.work").glob(f"layers-*/{file}")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw[:-9] if damage == "cut" else raw)
    with pytest.raises(CheckpointError, match=f"Delete '{path.parent}' to begin again"):
        compress(model, output, scheme="W4A8-g32-gptq", calibration=tokens, threads=1)
    assert not output.exists()


def test_states_are_read_and_written_by_windows(tmp_path, random_generator):
    values = torch.from_numpy(random_generator.standard_normal((5, 3, 7)).astype(np.float32))
    states = States(tmp_path / "a.f32", (5, 3, 7)).create()
    for batch in (slice(3, 9), slice(0, 2), slice(2, 3)):
        states[batch] = values[batch]
    assert torch.equal(states[:], values)
    assert torch.equal(states[1:4], values[1:4])
    before = states.checksum()
    os.truncate(states.path, states.path.stat().st_size - 1)
    assert states.checksum() != before
    with pytest.raises(CheckpointError, match="cut short"):
        states[4:]
    with pytest.raises(OutputError, match="Free space"):
        States(tmp_path / "absent" / "a.f32", (5, 3, 7)).create()
