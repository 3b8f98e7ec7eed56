"""The engine 'llama.cpp': the runtime that many users ship on, behind the Engine protocol.

A model is exported to a temporary GGUF file of its own formats, bit for bit, or refused by name; a GGUF file is used
as it is. llama.cpp runs on the processor in a process of its own (`llama_cpp_worker.py`), so that a crash there is an
error here, and its peak memory is its own. Greedy requests run wholly in that process and are timed there; sampled
ones are drawn here, by the sampler that all engines share, from logits that come over a pipe.

What differs from our engine is llama.cpp's own: it rounds the inputs of every product with an 8- or 4-bit matrix to
int8 in groups of 32, those of a bf16 or f16 matrix to that precision, whatever the model's recipe asks for; and its
results may depend in the last bits on how many tokens are computed at once. Left out: GPUs, batches, speculation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from trilemma.core.environment import usable_cores
from trilemma.core.errors import EngineError, InputError
from trilemma.model.model import Model
from trilemma.runtime.engine import EngineMemory, EngineOptions, Generation, SamplingSettings
from trilemma.runtime.llama_cpp_process import WorkerProcess
from trilemma.runtime.output import Output
from trilemma.runtime.requests import checked_tokens, context_of
from trilemma.runtime.sampling import check_sampling, choose

GGML_TYPE = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}  # of the cache
QUANT_BLOCK = 32
_ISAS = ("AMX_INT8", "AVX512", "AVX2", "AVX", "SVE", "NEON")


class LlamaCppEngine:
    """The Engine protocol on llama.cpp.

    The cache: 'f32'; 'bf16'; 'int8' asks for llama.cpp's 'q8_0', 'int4' for 'q4_0'; where nobody asks it is its
    default, 'f16'. 'none' does not exist there. Flash attention is on, but for an f32 cache.

    Args:
        model: of formats that GGUF holds without loss, or opened from a GGUF file.
        options: None takes all usable cores and the model's context up to DEFAULT_CONTEXT.

    Attributes:
        notes: what the exported file could not say.
        memory_method: where the figures of `memory` come from.

    Raises:
        InputError: a context longer than the model's, a cache that llama.cpp lacks, an instruction set asked for
            (the package's build has chosen one), or a format that GGUF does not hold.
        UnsupportedModelError: a structure that GGUF can not express.
        MissingExtraError: no llama-cpp-python. EngineError: llama.cpp refused the file or failed.
    """

    name = "llama.cpp"

    def __init__(self, model: Model, options: EngineOptions | None = None) -> None:
        options = options or EngineOptions()
        if options.isa is not None:
            raise InputError(f"llama.cpp's build has chosen its instruction set; leave isa '{options.isa}' out.")
        self.config = model.config
        self.max_context = context_of(model, options.max_context)
        self.threads: int = options.threads or usable_cores()
        self.kv_cache: str = _cache_of(model, options)
        self.notes: tuple[str, ...] = ()
        self._worker = WorkerProcess()
        try:
            found = self._open(model)
        except BaseException:
            self._worker.close()
            raise
        self.version: str = found["version"]
        self.isa: str = f"{_isa_of(found['system'])} (llama.cpp)"
        self.memory_method, self._memory = _memory_of(found)

    def memory(self) -> EngineMemory:
        """Bytes of weights, cache and buffers, as llama.cpp itself counts and states them."""
        return self._memory

    def logits(self, tokens: NDArray[np.int32] | Sequence[int], *, last_only: bool = False) -> NDArray[np.float32]:
        """Logits (n, vocab), or (1, vocab) with `last_only`, of a fresh sequence."""
        return self._forward(self._checked(tokens), fresh=True, every=not last_only)

    def generate(
        self,
        prompt: Sequence[int],
        settings: SamplingSettings,
        on_token: Callable[[int], bool | None] | None = None,
    ) -> Generation:
        """Continue `prompt`; a stop token ends the output and is not part of it.

        Times of a greedy request are llama.cpp's process's own; those of a sampled one include the pipe.
        """
        check_sampling(settings)
        ids = self._checked(prompt)
        if len(ids) >= self.max_context:
            raise InputError(f"The prompt's {len(ids)} tokens fill the context of {self.max_context}; shorten it.")
        if settings.temperature == 0 and settings.repetition_penalty == 1:
            return self._greedy(ids, settings, on_token)
        output = Output([int(token) for token in ids], settings, self.config, self.max_context, on_token)
        logits = self._forward(ids, fresh=True, every=False)
        while output.push(token := choose(logits[0], output.seen, settings)):
            logits = self._forward(np.array([token], np.int32), fresh=False, every=False)
        return output.generation()

    def peak_resident_bytes(self) -> int:
        """High-water resident set of the process in which llama.cpp runs; mapped pages of the file are in it."""
        return int(self._worker.ask({"do": "describe"})[0]["peak_bytes"])

    @staticmethod
    def empty_peak_bytes() -> int:
        """The same of a process that has loaded the library and opened nothing."""
        worker = WorkerProcess()
        try:
            return int(worker.ask({"do": "peak"})[0]["peak_bytes"])
        finally:
            worker.close()

    def close(self) -> None:
        """End the process; the engine can not be asked afterwards."""
        self._worker.close()

    def _open(self, model: Model) -> dict[str, Any]:
        """Open the model's file; an exported one is removed as soon as it is open, or was refused."""
        from trilemma.formats.gguf.read import GgufSource
        from trilemma.formats.gguf.write import write_gguf

        if isinstance(model.source, GgufSource) and not model.replaced:
            return self._open_file(model.source.path)
        with tempfile.TemporaryDirectory(prefix="trilemma-gguf-") as folder:
            path = Path(folder) / "model.gguf"
            self.notes = write_gguf(model, path).notes
            return self._open_file(path)

    def _open_file(self, path: Path) -> dict[str, Any]:
        task = {
            "do": "open", "path": str(path.resolve()), "context": self.max_context, "threads": self.threads,
            "kv_type": GGML_TYPE[self.kv_cache], "flash": self.kv_cache != "f32",
        }  # fmt: skip
        found, _ = self._worker.ask(task)
        if found["vocab_size"] != self.config.vocab_size:
            raise EngineError(
                f"llama.cpp reads {found['vocab_size']} tokens from '{path}', and its header says "
                f"{self.config.vocab_size}. The file is damaged: make it again."
            )
        return found

    def _greedy(
        self, ids: NDArray[np.int32], settings: SamplingSettings, on_token: Callable[[int], bool | None] | None
    ) -> Generation:
        stops = set(settings.stop_token_ids) | (set() if settings.ignore_eos else set(self.config.eos_token_ids))
        task = {
            "do": "generate", "max_tokens": settings.max_tokens, "room": self.max_context,
            "stops": sorted(int(token) for token in stops), "ask": on_token is not None,
        }  # fmt: skip
        found, _ = self._worker.ask(task, _bytes(ids))
        while "token" in found:
            assert on_token is not None
            try:
                go_on = on_token(found["token"]) is not False
            except BaseException:
                self._worker.ask({"do": "go on", "go_on": False})  # the worker is ready for another request
                raise
            found, _ = self._worker.ask({"do": "go on", "go_on": go_on})
        return Generation(found["tokens"], cast(Any, found["reason"]), len(ids), found["times_s"])

    def _forward(self, ids: NDArray[np.int32], *, fresh: bool, every: bool) -> NDArray[np.float32]:
        found, payload = self._worker.ask({"do": "logits", "fresh": fresh, "every": every}, _bytes(ids))
        return np.frombuffer(payload, dtype=np.float32).reshape(found["rows"], self.config.vocab_size)

    def _checked(self, tokens: NDArray[np.int32] | Sequence[int]) -> NDArray[np.int32]:
        return checked_tokens(tokens, self.config.vocab_size, self.max_context)


def _cache_of(model: Model, options: EngineOptions) -> str:
    """What was asked for; the model's own int8 or int4; else f16, llama.cpp's default (bf16 is only ours)."""
    asked: str = options.kv_cache or {"bf16": "f16", "none": "f16"}.get(model.run.kv_cache, model.run.kv_cache)
    asked = {"int8": "q8_0", "int4": "q4_0"}.get(asked, asked)
    if asked not in GGML_TYPE:
        raise InputError(f"llama.cpp always keeps a cache; '{asked}' is not possible. Choose f32, bf16, int8 or int4.")
    dims = {layer.attention.head_dim for layer in model.config.layers if layer.attention is not None}
    if asked in ("q8_0", "q4_0") and any(dim % QUANT_BLOCK for dim in dims):
        raise InputError(
            f"llama.cpp's {asked} cache needs heads of a multiple of {QUANT_BLOCK} dimensions; these "
            f"have {sorted(dims)}. Choose f32 or bf16."
        )
    return asked


def _memory_of(found: dict[str, Any]) -> tuple[str, EngineMemory]:
    if found["kv_bytes"]:
        method = "llama_model_size, and the buffers that llama.cpp reports when it opens a context"
        return method, EngineMemory(found["weights_bytes"], found["kv_bytes"], found["scratch_bytes"])
    rest = max(0, found["peak_bytes"] - found["weights_bytes"])
    method = "llama_model_size, and what its process holds beyond it; this build does not report its buffers"
    return method, EngineMemory(found["weights_bytes"], 0, rest)


def _isa_of(system: str) -> str:
    """The widest instruction set in llama.cpp's line of system facts, 'AVX2 = 1 | ...'."""
    used = {part.split("=")[0].split(":")[-1].strip() for part in system.split("|") if part.strip().endswith("= 1")}
    return next((name.lower() for name in _ISAS if name in used), "unknown")


def _bytes(ids: NDArray[np.int32]) -> memoryview:
    return np.ascontiguousarray(ids, dtype=np.int32).view(np.uint8).data
