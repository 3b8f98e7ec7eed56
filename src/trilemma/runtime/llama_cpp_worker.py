"""The process in which llama.cpp runs: one GGUF file, asked over pipes. Standard library, numpy and llama_cpp alone.

Started by `llama_cpp.py` with the interpreter that has the package llama-cpp-python, which need not have Trilemma:
nothing of ours may be imported here. Only the C functions of the package are used.

A message is four bytes with the length of a JSON object (little endian), the object, and as many raw bytes as its
'bytes' says: int32 tokens in, float32 logits out. Standard output is ours alone: what the library prints goes to
standard error. Times are taken here, so that no pipe is in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import re
import resource
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MOST_LOGITS_BYTES = 1 << 28  # logits of all positions are computed in parts of at most this
UBATCH = 512  # positions computed at once, llama.cpp's own choice
_BUFFER = re.compile(r"(model|KV|compute|output)\s+buffer size\s*=\s*([\d.]+) MiB")


class RefusedError(Exception):
    """What was asked can not be done; the message goes back."""


class Pipe:
    """Messages in and out, over descriptors that nobody else writes to."""

    def __init__(self) -> None:
        self._in: BinaryIO = sys.stdin.buffer
        self._out: BinaryIO = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)

    def receive(self) -> tuple[dict[str, Any], bytes] | None:
        head = self._in.read(4)
        if len(head) < 4:
            return None
        found: dict[str, Any] = json.loads(self._in.read(int.from_bytes(head, "little")))
        return found, self._in.read(found.get("bytes", 0))

    def send(self, found: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        text = json.dumps({**found, "bytes": len(payload)}).encode()
        self._out.write(len(text).to_bytes(4, "little") + text)
        self._out.write(payload)
        self._out.flush()


class LlamaCpp:
    """One model and one context; the context is emptied before each request."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._lib = lib = load_library()
        self._log: list[str] = []
        self._callback = lib.llama_log_callback(self._keep)
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = self._open_model(task["path"])
        self._context, self._batch_size = self._open_context(task)
        model = self._model
        vocab = lib.llama_model_get_vocab(model) if hasattr(lib, "llama_model_get_vocab") else model
        count = getattr(lib, "llama_vocab_n_tokens", None) or lib.llama_n_vocab
        self.vocab_size = int(count(vocab))
        self._memory = lib.llama_get_memory(self._context) if hasattr(lib, "llama_get_memory") else None
        self._length = 0

    def describe(self) -> dict[str, Any]:
        """What the engine states: sizes by llama.cpp's own account, the instruction sets of its build."""
        lib, held = self._lib, dict.fromkeys(("model", "KV", "compute", "output"), 0.0)
        for line in self._log:
            for kind, size in _BUFFER.findall(line):
                held[kind] += float(size) * (1 << 20)
        return {
            "vocab_size": self.vocab_size, "context": int(lib.llama_n_ctx(self._context)),
            "weights_bytes": int(lib.llama_model_size(self._model)), "kv_bytes": int(held["KV"]),
            "scratch_bytes": int(held["compute"] + held["output"]), "version": version_of(),
            "system": lib.llama_print_system_info().decode(errors="replace"), "peak_bytes": peak_bytes(),
        }  # fmt: skip

    def clear(self) -> None:
        if self._memory is not None:
            self._lib.llama_memory_clear(self._memory, False)
        else:
            self._lib.llama_kv_cache_clear(self._context)
        self._length = 0

    def forward(self, tokens: np.ndarray, *, every: bool) -> np.ndarray:
        """Append tokens; logits (rows, vocab) of all of them or of the last, valid until the next call."""
        part = max(1, min(self._batch_size, MOST_LOGITS_BYTES // (4 * self.vocab_size)) if every else self._batch_size)
        rows = [
            self._decode(tokens[at : at + part], every, at + part >= len(tokens)) for at in range(0, len(tokens), part)
        ]
        kept = [found for found in rows if found is not None]
        return kept[0] if len(kept) == 1 else np.concatenate(kept)

    def next_token(self, tokens: np.ndarray) -> int:
        """Append tokens and take the largest logit, the first of equal ones."""
        return int(self.forward(tokens, every=False)[0].argmax())

    def _decode(self, tokens: np.ndarray, every: bool, last: bool) -> np.ndarray | None:
        count, batch = len(tokens), self._batch
        batch.n_tokens = count
        np.ctypeslib.as_array(batch.token, (count,))[:] = tokens
        np.ctypeslib.as_array(batch.pos, (count,))[:] = np.arange(self._length, self._length + count)
        wanted = np.ctypeslib.as_array(batch.logits, (count,))
        wanted[:] = 1 if every else 0
        wanted[-1] = every or last
        failed = self._lib.llama_decode(self._context, batch)
        if failed:
            raise RefusedError(f"llama_decode gave {failed} at position {self._length}: {self.last_lines()}")
        self._length += count
        if not every:
            if not last:
                return None
            pointer, rows = self._lib.llama_get_logits_ith(self._context, count - 1), 1
        else:
            pointer, rows = self._lib.llama_get_logits(self._context), count
        found = np.ctypeslib.as_array(pointer, (rows * self.vocab_size,)).reshape(rows, self.vocab_size)
        return found.copy() if every else found

    def last_lines(self) -> str:
        """What llama.cpp said last of an error, or last at all."""
        lines = "".join(self._log).splitlines()
        told = [line for line in lines if "error" in line or "fail" in line] or lines
        return " ".join(" ".join(told[-2:]).split())[-500:] or "no reason was given"

    def _keep(self, _level: int, text: bytes, _user: int) -> None:
        if text:
            self._log.append(text.decode(errors="replace"))

    def _open_model(self, path: str) -> Any:
        lib = self._lib
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        load = getattr(lib, "llama_model_load_from_file", None) or lib.llama_load_model_from_file
        model = load(path.encode(), params)
        if not model:
            raise RefusedError(f"llama.cpp can not load the file: {self.last_lines()}")
        return model

    def _open_context(self, task: dict[str, Any]) -> tuple[Any, int]:
        lib = self._lib
        params = lib.llama_context_default_params()
        size = min(UBATCH, task["context"])
        settings = {
            "n_ctx": task["context"], "n_batch": size, "n_ubatch": size, "n_seq_max": 1,
            "n_threads": task["threads"], "n_threads_batch": task["threads"], "type_k": task["kv_type"],
            "type_v": task["kv_type"], "flash_attn_type": int(task["flash"]), "flash_attn": task["flash"],
            "offload_kqv": False, "op_offload": False, "no_perf": True,
        }  # fmt: skip
        names = {name for name, *_ in type(params)._fields_}
        for name, value in settings.items():
            if name in names:
                setattr(params, name, value)
        make = getattr(lib, "llama_init_from_model", None) or lib.llama_new_context_with_model
        context = make(self._model, params)
        if not context:
            raise RefusedError(f"llama.cpp can not open a context: {self.last_lines()}")
        self._batch = lib.llama_batch_init(size, 0, 1)
        np.ctypeslib.as_array(self._batch.n_seq_id, (size,))[:] = 1
        for index in range(size):
            self._batch.seq_id[index][0] = 0
        return context, size


def load_library() -> Any:
    """The module of C functions, without the package around it, whose imports would count as memory and time."""
    if "llama_cpp.llama_cpp" in sys.modules:
        return sys.modules["llama_cpp.llama_cpp"]
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise RefusedError(f"'{sys.executable}' has no package llama_cpp")
    shell = types.ModuleType("llama_cpp")
    shell.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = shell
    return importlib.import_module("llama_cpp.llama_cpp")


def version_of() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "unknown"


def peak_bytes() -> int:
    """High-water resident set of this process."""
    with contextlib.suppress(OSError), Path("/proc/self/status").open(encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def greedy(engine: LlamaCpp, pipe: Pipe, task: dict[str, Any], prompt: np.ndarray) -> dict[str, Any]:
    """The loop of a greedy request; with `ask`, each token waits for a word whether to go on."""
    stops, reason = set(task["stops"]), ""
    tokens: list[int] = []
    times_s: list[float] = []
    begun = time.perf_counter()
    engine.clear()
    token = engine.next_token(prompt)
    while not reason:
        if token in stops:
            return {"tokens": tokens, "times_s": times_s, "reason": "stop"}
        tokens.append(token)
        times_s.append(time.perf_counter() - begun)
        if task["ask"]:
            pipe.send({"token": token})
            answer = pipe.receive()
            if answer is None:
                sys.exit(0)
            reason = "" if answer[0]["go_on"] else "interrupted"
        if not reason and len(tokens) >= task["max_tokens"]:
            reason = "length"
        elif not reason and len(prompt) + len(tokens) >= task["room"]:
            reason = "context"
        if not reason:
            token = engine.next_token(np.array([token], np.int32))
    return {"tokens": tokens, "times_s": times_s, "reason": reason}


def answer(engine: LlamaCpp, pipe: Pipe, task: dict[str, Any], payload: bytes) -> None:
    tokens = np.frombuffer(payload, dtype=np.int32)
    if task["do"] == "generate":
        pipe.send(greedy(engine, pipe, task, tokens))
    elif task["do"] == "describe":
        pipe.send(engine.describe())
    else:
        if task["fresh"]:
            engine.clear()
        found = np.ascontiguousarray(engine.forward(tokens, every=task["every"]))
        pipe.send({"rows": len(found)}, found.reshape(-1).view(np.uint8).data)


def end_with_parent(parent: int) -> None:
    """Leave when the process that asked is gone, also in the middle of a long computation."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    pipe = Pipe()
    engine: LlamaCpp | None = None
    while (message := pipe.receive()) is not None:
        task, payload = message
        try:
            if task["do"] == "peak":
                load_library()
                pipe.send({"peak_bytes": peak_bytes()})
            elif engine is None:
                engine = LlamaCpp(task)
                pipe.send(engine.describe())
            else:
                answer(engine, pipe, task, payload)
        except RefusedError as refused:
            pipe.send({"error": str(refused)})
        except MemoryError:
            pipe.send({"error": "there is not enough memory"})


if __name__ == "__main__":
    main()
