"""Talking to the process in which llama.cpp runs: start it, ask, and say clearly what went wrong.

The messages are those of `llama_cpp_worker.py`. A worker that ends, hangs or is missing its package becomes an
EngineError with the fix; whatever stops a request, Ctrl-C above all, ends the worker too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trilemma.core.errors import EngineError, InputError, MissingExtraError

INTERPRETER = "TRILEMMA_LLAMA_CPP"
TIMEOUT_S = 1800.0
"""Longest wait for one answer: prefill of a long text on a small device takes minutes, never half an hour."""

_CHUNK = 1 << 20
_RUN = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"  # keeps our folder off the search path
_CLOSING_S = 2.0


def interpreter() -> str:
    """The Python that has llama-cpp-python: the one that TRILEMMA_LLAMA_CPP names, or this one.

    Raises:
        InputError: the variable names nothing that can be run.
        MissingExtraError: the package is nowhere.
    """
    named = os.environ.get(INTERPRETER)
    if named:
        if not (Path(named).is_file() and os.access(named, os.X_OK)):
            raise InputError(f"{INTERPRETER} is '{named}', which can not be run. Name a Python with llama-cpp-python.")
        return named
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingExtraError("llama-cpp-python", "llama-cpp", f"The engine 'llama.cpp' (without {INTERPRETER})")
    return sys.executable


class WorkerProcess:
    """One worker; `ask` sends a message and waits for its answer. Use `close` to end it."""

    def __init__(self, timeout_s: float | None = None, *, script: Path | None = None) -> None:
        self._timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._interpreter = interpreter()
        script = script or Path(__file__).with_name("llama_cpp_worker.py")
        try:
            self._process = subprocess.Popen(
                [self._interpreter, "-c", _RUN, str(script)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0,
                cwd=script.parent.anchor,
            )  # fmt: skip
        except OSError as error:
            raise EngineError(
                f"llama.cpp's process can not be started with '{self._interpreter}': {error.strerror or error}."
            ) from None

    def ask(self, task: dict[str, Any], payload: bytes | memoryview = b"") -> tuple[dict[str, Any], bytes]:
        """Send one message and wait for the next one back.

        Raises:
            EngineError: llama.cpp refused, or its process ended, hung, or was closed before.
        """
        try:
            self.send(task, payload)
            return self.receive()
        except BaseException as error:
            if not isinstance(error, EngineError):
                self.close()
            raise

    def send(self, task: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        text = json.dumps({**task, "bytes": len(payload)}).encode()
        pipe = self._process.stdin
        if pipe is None or pipe.closed:
            raise EngineError("The engine is closed.")
        try:
            for part in (len(text).to_bytes(4, "little") + text, payload):
                left = memoryview(part)
                while left:
                    left = left[pipe.write(left) :]
        except OSError:
            raise self._ended() from None

    def receive(self) -> tuple[dict[str, Any], bytes]:
        deadline = time.monotonic() + self._timeout_s
        size = int.from_bytes(self._read(4, deadline), "little")
        found: dict[str, Any] = json.loads(self._read(size, deadline))
        payload = self._read(found.get("bytes", 0), deadline)
        if "error" in found:
            raise EngineError(self._explained(str(found["error"])))
        return found, payload

    def close(self) -> None:
        """End the worker, whatever it does."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        if self._process.poll() is None:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSING_S)
        self._errors.close()

    def _read(self, count: int, deadline: float) -> bytes:
        pipe = self._process.stdout
        if pipe is None or pipe.closed:
            raise EngineError("The engine is closed.")
        found = bytearray()
        while len(found) < count:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise EngineError(
                    f"llama.cpp gave no answer for {self._timeout_s:g} s and was stopped. "
                    "Ask for fewer tokens or a shorter context, or free the machine."
                )
            part = os.read(pipe.fileno(), min(_CHUNK, count - len(found)))
            if not part:
                raise self._ended()
            found += part
        return bytes(found)

    def _ended(self) -> EngineError:
        try:
            code = self._process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            code = 0
        said = self._last_line()
        self.close()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        hint = " It may have run out of memory: try a shorter context." if code == -9 else ""
        return EngineError(f"llama.cpp's process ended {how}{f': {said}' if said else '.'}{hint}")

    def _explained(self, reason: str) -> str:
        if "no package llama_cpp" in reason:
            return (
                f"{INTERPRETER} names a Python without llama-cpp-python ({self._interpreter}). Install the package "
                f"there: {self._interpreter} -m pip install llama-cpp-python"
            )
        return reason

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return " ".join(lines[-1].split())[-400:] if lines else ""
