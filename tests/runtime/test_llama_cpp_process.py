"""The process behind the engine llama.cpp: what is missing, ends, hangs or is stopped becomes one clear error."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest

from trilemma.core.errors import EngineError, InputError, MissingExtraError
from trilemma.runtime import llama_cpp_process
from trilemma.runtime.llama_cpp_process import INTERPRETER, WorkerProcess, interpreter

ECHO = """
import json, sys
while head := sys.stdin.buffer.read(4):
    task = json.loads(sys.stdin.buffer.read(int.from_bytes(head, "little")))
    payload = sys.stdin.buffer.read(task["bytes"])
    text = json.dumps({"bytes": len(payload), "got": task["do"]}).encode()
    sys.stdout.buffer.write(len(text).to_bytes(4, "little") + text + payload[::-1])
    sys.stdout.buffer.flush()
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Starts a worker that runs the given program instead of llama.cpp."""
    monkeypatch.setenv(INTERPRETER, sys.executable)
    started = []

    def start(program: str, timeout_s: float = 20.0) -> WorkerProcess:
        script = tmp_path / "worker.py"
        script.write_text(program, encoding="utf-8")
        started.append(WorkerProcess(timeout_s, script=script))
        return started[-1]

    yield start
    for one in started:
        one.close()


def ended(one: WorkerProcess) -> bool:
    return one._process.poll() is not None


def test_messages_and_payloads_of_any_size_go_both_ways(worker):
    one = worker(ECHO)
    for size in (0, 1, 70_000, 3_000_000):
        payload = os.urandom(size)
        found, back = one.ask({"do": "turn"}, payload)
        assert found["got"] == "turn"
        assert back == payload[::-1]


def test_a_worker_that_ends_says_how_and_its_last_words(worker):
    one = worker("import sys; sys.stdin.buffer.read(4); print('GGML_ASSERT failed', file=sys.stderr); sys.exit(7)")
    with pytest.raises(EngineError, match=r"exit code 7: GGML_ASSERT failed"):
        one.ask({"do": "open"})
    with pytest.raises(EngineError, match="closed"):
        one.ask({"do": "open"})


def test_a_crash_names_its_signal(worker):
    one = worker("import os, sys; sys.stdin.buffer.read(4); os.kill(os.getpid(), 11)")
    with pytest.raises(EngineError, match="by signal 11"):
        one.ask({"do": "open"})


def test_a_worker_that_hangs_is_stopped(worker):
    one = worker("import time; time.sleep(60)", timeout_s=0.5)
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer for 0\.5 s"):
        one.ask({"do": "open"})
    assert time.monotonic() - begun < 20
    assert ended(one)


def test_ctrl_c_ends_the_worker(worker, monkeypatch):
    one = worker("import time; time.sleep(60)")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(llama_cpp_process.select, "select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.ask({"do": "open"})
    assert ended(one)


def test_a_refusal_leaves_the_worker_alive(worker):
    refuse = ECHO.replace('"got": task["do"]', '"error": "no such thing"').replace("+ payload[::-1]", "")
    one = worker(refuse)
    for _ in range(2):
        with pytest.raises(EngineError, match="no such thing"):
            one.ask({"do": "open"})
    assert not ended(one)
    one.close()
    assert ended(one)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.delenv(INTERPRETER, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"trilemma\[llama-cpp\]"):
        interpreter()


def test_an_interpreter_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(INTERPRETER, str(tmp_path / "python"))
    with pytest.raises(InputError, match=r"can not be run.*llama-cpp-python"):
        interpreter()


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="this Python has llama-cpp-python")
def test_an_interpreter_without_the_package_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setenv(INTERPRETER, sys.executable)
    one = WorkerProcess()
    with pytest.raises(EngineError, match="-m pip install llama-cpp-python"):
        one.ask({"do": "peak"})
    one.close()


def test_the_worker_imports_nothing_of_ours():
    text = Path(llama_cpp_process.__file__).with_name("llama_cpp_worker.py").read_text(encoding="utf-8")
    assert "trilemma" not in [
        word for line in text.splitlines() if "import" in line for word in line.replace(".", " ").split()
    ]
