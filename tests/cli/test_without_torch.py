"""A device that runs, checks and measures a model installs no torch: here importing it raises."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "huggingface_hub", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
sys.argv = ["trilemma", *sys.argv[1:]]
from trilemma.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def trilemma_without(repository):
    def run(*arguments):
        command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=120)

    return run


@pytest.fixture(scope="module")
def artifact(hearth_path, trilemma_without, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without") / "artifact"
    done = trilemma_without("compress", hearth_path, "-o", folder, "--scheme", "W4A8-g32")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["run", "{artifact}", "Once upon a time", "--max-tokens", "5"],
        ["inspect", "{artifact}"],
        ["list"],
        ["bench", "{artifact}", "--prompt", "8", "--output", "4", "--repetitions", "1"],
        ["eval", "{artifact}", "--data", "{texts}", "--context", "64", "--max-tokens", "1000"],
        ["export", "{artifact}", "-o", "{artifact}.gguf"],
    ],
    ids=lambda command: command[0],
)
def test_works_without_torch(command, artifact, texts_path, trilemma_without):
    names = {"artifact": str(artifact), "texts": str(texts_path)}
    done = trilemma_without(*(part.format(**names) for part in command))
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_what_needs_torch_says_how_to_get_it(hearth_path, texts_path, trilemma_without, tmp_path):
    done = trilemma_without(
        "compress", hearth_path, "-o", tmp_path / "out", "--scheme", "W4A8-g32-gptq", "--data", texts_path
    )
    assert done.returncode == 2
    assert "pip install 'trilemma[compress]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_engine_imports_no_torch(hearth_path):
    probe = (
        "import sys; from trilemma.runtime import native; import trilemma;"
        f"trilemma.open({str(hearth_path)!r}).generate('Once', max_tokens=2);"
        "print([name for name in ('torch', 'scipy', 'transformers', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
