"""benchmarks/builds.py times builds and settings by turns, each as it was asked for, and says what did not start."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trilemma import _native

BUILDS = Path(__file__).resolve().parents[2] / "benchmarks" / "builds.py"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BUILDS), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("what", ["prefill:20", "decode:3", "batch:2", "products:4"])
def test_variants_by_turns(what, hearth_path, tmp_path):
    copied = shutil.copy(_native.__file__, tmp_path / "other.so")
    done = run(hearth_path, "--what", what, "--rounds", 2, "installed", f"{copied},isa=scalar,threads=1")
    assert done.returncode == 0, done.stderr
    first, second = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert first[1] == _native.supported_isas()[-1]
    assert second[1] == "scalar"
    assert first[4] == "1.000 (1.000 to 1.000)"
    assert 0 < float(first[3]) <= float(first[2])
    assert float(second[4].split()[0]) > 1  # one thread of plain code against two of the host's best


def test_the_given_library_is_the_one_that_works(hearth_path, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(Path(_native.__file__).read_bytes()[:1000])
    done = run(hearth_path, "--what", "prefill:20", "installed", f"{broken}")
    assert done.returncode == 2
    assert f"'{broken}' did not start" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--what", "sleep:5", "installed"], "expected KIND:N"),
        (["installed,speed=9"], "unknown speed; choose of isa, kv, threads"),
        (["missing.so"], "'missing.so' is no file"),
        (["--rounds", "0", "installed"], "--rounds 0: at least one"),
    ],
)
def test_wrong_words(words, message, hearth_path):
    done = run(hearth_path, *words)
    assert done.returncode == 2
    assert message in done.stderr
