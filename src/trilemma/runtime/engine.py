"""What every engine offers: logits of given tokens, generation, and an account of its memory.

Engines are opened by `trilemma.runtime.open_engine`; tables of engines live in `runtime/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trilemma.core.record import Record
from trilemma.model.config import DecoderConfig

KvCache = Literal["none", "f32", "bf16", "int8", "int4"]
LoadMode = Literal["map", "copy"]
FinishReason = Literal["length", "stop", "context", "interrupted"]


class EngineOptions(Record):
    """How to open a model. None takes the default: all usable cores, the model's own KV precision and context.

    share_prefixes: tokens that a request begins with, and that an earlier one held, are taken from the cache instead of
        computed again; the output is the same, bit for bit. By default on where text is answered (`trilemma.open`),
        within a batch and in scoring tasks, and off in an engine opened by itself, whose requests may be timed.
        Engines other than the native one ignore it.
    load: 'copy' reads the weights into memory of the engine's own, 'map' uses an artifact's pages where they lie in
        the file, shared with other processes and given back under pressure; 'copy' by default.
    verify: compare an artifact's weights with their checksums; by default what is copied is, what is mapped is not.
    """

    threads: int | None = None
    kv_cache: KvCache | None = None
    max_context: int | None = None
    load: LoadMode | None = None
    verify: bool | None = None
    isa: Literal["scalar", "avx2", "avxvnni", "avx512", "avx512bf16", "amx", "neon"] | None = None
    share_prefixes: bool | None = None


class SamplingSettings(Record):
    """How the next token is chosen. temperature 0 is greedy."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class EngineMemory:
    """Bytes held by an engine, counted by itself."""

    weights_bytes: int
    kv_bytes: int
    scratch_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.scratch_bytes


@dataclass(frozen=True)
class Generation:
    """Output of one request. `token_times_s` are seconds from the request to each output token; `reused_tokens` of
    the prompt were in the cache already."""

    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    token_times_s: list[float] = field(default_factory=list)
    reused_tokens: int = 0


class Engine(Protocol):
    """A loaded model that can be asked. Not thread-safe; `close` frees it."""

    name: str
    config: DecoderConfig
    threads: int
    isa: str
    kv_cache: str
    max_context: int

    def memory(self) -> EngineMemory: ...

    def logits(self, tokens: NDArray[np.int32] | Sequence[int], *, last_only: bool = False) -> NDArray[np.float32]:
        """Logits of a fresh sequence: (n, vocab), or (1, vocab) with `last_only`.

        Raises:
            InputError: no tokens, a token outside the vocabulary, or more than `max_context`.
        """
        ...

    def generate(
        self,
        prompt: Sequence[int],
        settings: SamplingSettings,
        on_token: Callable[[int], bool | None] | None = None,
    ) -> Generation:
        """Continue `prompt`. `on_token` sees each token as it comes; returning False stops.

        Raises:
            InputError: an empty prompt, or one that fills the context.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class Settling(Protocol):
    """An engine that does some of the work of opening in the course of its first few hundred tokens."""

    def settle(self) -> None: ...


def settle(engine: object) -> None:
    """Let an engine do now what is left of opening, so that what is timed next is its steady state."""
    if isinstance(engine, Settling):
        engine.settle()
