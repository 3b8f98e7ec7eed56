"""The native engine: weights handed to C++ tensor by tensor, and the Engine protocol on top of it.

All the work of a token is done in `trilemma._native`; this file translates records, checks what
users give, and names what is wrong. Packing formats is left to `trilemma.formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from trilemma.core.environment import usable_cores
from trilemma.core.errors import EngineError, InputError
from trilemma.model.model import Model
from trilemma.runtime.engine import EngineMemory, EngineOptions, Generation, SamplingSettings
from trilemma.runtime.native_weights import _native
from trilemma.runtime.native_weights import load_weights as load_weights
from trilemma.runtime.requests import checked_tokens, context_of
from trilemma.runtime.sampling import check_sampling

LogitsOf = Literal["none", "last", "all"]


def supported_isas() -> list[str]:
    """Instruction sets that this host can run, slowest first."""
    return _native.supported_isas()


class NativeEngine:
    """The Engine protocol in C++.

    Results are bit-equal whatever the number of threads, the way tokens are split over calls, and the
    instruction set; only products of bf16 inputs on avx512bf16 and amx round in the processor's own way.

    Args:
        model: plain matrices run with f32 or bf16 activations, quantized ones also with int8-g32.
        options: None takes all usable cores, the fastest instruction set (or the one that the
            environment variable TRILEMMA_ISA names), the model's own KV precision, and the model's
            context up to DEFAULT_CONTEXT.

    Raises:
        InputError: a context longer than the model's, or an instruction set that the host lacks.
        CheckpointError: a tensor of the wrong shape or size.
        UnsupportedModelError: a storage format or an architecture option that the kernels do not run.
    """

    name = "native"

    def __init__(self, model: Model, options: EngineOptions | None = None) -> None:
        options = options or EngineOptions()
        self.config = model.config
        self.max_context = context_of(model, options.max_context)
        self.kv_cache: str = options.kv_cache or model.run.kv_cache
        self._options = options
        self._weights: _native.Model | None = load_weights(
            model, threads=options.threads or usable_cores(), load=options.load or "copy", verify=options.verify
        )
        self._context: _native.Context | None = self._open(self.max_context, 1, self.shares(False))
        self.isa: str = self._context.isa
        self.threads: int = self._context.threads

    def memory(self) -> EngineMemory:
        """Bytes of weights (padding included), KV cache and scratch, counted by the engine."""
        return EngineMemory(*self._opened().memory())

    def logits(self, tokens: NDArray[np.int32] | Sequence[int], *, last_only: bool = False) -> NDArray[np.float32]:
        """Logits (n, vocab), or (1, vocab) with `last_only`, of a fresh sequence."""
        ids = self._checked(tokens)
        context = self._opened()
        with _faults():
            sequence, held = context.begin(ids) if last_only else (context.create(), 0)
            try:
                return context.forward([(sequence, ids[held:], "last" if last_only else "all")])
            finally:
                context.release(sequence)

    def generate(
        self,
        prompt: Sequence[int],
        settings: SamplingSettings,
        on_token: Callable[[int], bool | None] | None = None,
    ) -> Generation:
        """Continue `prompt`; a stop token ends the output and is not part of it."""
        check_sampling(settings)
        ids = self._checked(prompt)
        stops = set(settings.stop_token_ids) | (set() if settings.ignore_eos else set(self.config.eos_token_ids))
        with _faults():
            tokens, times_s, reason, reused = self._opened().generate(
                ids.tolist(),
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                min_p=settings.min_p,
                repetition_penalty=settings.repetition_penalty,
                seed=settings.seed & (2**64 - 1),
                stop_tokens=sorted(stops),
                on_token=on_token,
            )
        return Generation(tokens, cast(Any, reason), len(ids), times_s, reused)

    def settle(self) -> None:
        """Move the weights to huge pages now; by itself the engine does so after a few hundred passes over them."""
        self._opened()
        assert self._weights is not None
        self._weights.settle(self.threads)

    def shares(self, default: bool) -> bool:
        """Whether to share prefixes: what the options say, or `default` where they say nothing."""
        return default if self._options.share_prefixes is None else self._options.share_prefixes

    def open_sequences(
        self,
        count: int,
        *,
        max_context: int | None = None,
        kv_positions: int | None = None,
        share_prefixes: bool | None = None,
    ) -> SequenceBatch:
        """Room for `count` sequences of up to `max_context` tokens each, over the same weights.

        Args:
            kv_positions: of all sequences together, rounded up to pages of 128; `max_context` of each by default. A
                step that needs more is refused before anything is computed.
            share_prefixes: see EngineOptions, which this overrides.

        Raises:
            InputError: a number that is not possible.
        """
        if count < 1:
            raise InputError(f"open_sequences was asked for {count} sequences; it must be at least 1.")
        if kv_positions is not None and kv_positions < 1:
            raise InputError(f"kv_positions={kv_positions} is not possible; give at least 1, or leave it out.")
        context = self.max_context if max_context is None else max_context
        share = self.shares(False) if share_prefixes is None else share_prefixes
        return SequenceBatch(self._open(context, count, share, kv_positions or 0), self.config.vocab_size, share)

    def close(self) -> None:
        """Free weights and cache; the engine can not be asked afterwards."""
        self._context = self._weights = None

    def _open(self, max_context: int, sequences: int, share: bool, kv_positions: int = 0) -> _native.Context:
        if self._weights is None:
            raise EngineError("The engine is closed.")
        with _faults():
            return _native.Context(
                self._weights,
                threads=self._options.threads or usable_cores(),
                isa=self._options.isa or "",
                kv_cache=self.kv_cache,
                max_context=max_context,
                max_sequences=sequences,
                kv_positions=kv_positions,
                share_prefixes=share,
            )

    def _opened(self) -> _native.Context:
        if self._context is None:
            raise EngineError("The engine is closed.")
        return self._context

    def _checked(self, tokens: NDArray[np.int32] | Sequence[int]) -> NDArray[np.int32]:
        return checked_tokens(tokens, self.config.vocab_size, self.max_context)


@dataclass(frozen=True)
class Step:
    """Tokens to append to one sequence, and which of their logits are wanted."""

    sequence: int
    tokens: Sequence[int] | NDArray[np.int32]
    logits: LogitsOf = "last"


class SequenceBatch:
    """Several sequences over one engine's weights: prefill and decode mixed in one `forward`.

    Each sequence gets the logits that it would get alone, bit for bit.

    Attributes:
        share_prefixes: whether `begin` finds anything.
    """

    def __init__(self, context: _native.Context, vocab_size: int, share_prefixes: bool = False) -> None:
        self._context = context
        self._vocab_size = vocab_size
        self.share_prefixes = share_prefixes

    def create(self) -> int:
        """An empty sequence. Raises InputError when all are taken."""
        with _faults():
            return self._context.create()

    def begin(self, tokens: NDArray[np.int32] | Sequence[int]) -> tuple[int, int]:
        """A sequence that holds what is in the cache of these tokens' beginning: (sequence, positions held).

        The last token is never among them, so that a step with the rest gives its logits. What earlier sequences
        held is kept until its memory is needed.
        """
        ids = checked_tokens(tokens, self._vocab_size)
        with _faults():
            return self._context.begin(ids)

    def fork(self, sequence: int) -> int:
        """A copy of a sequence; the two go on independently and share what they have in common."""
        with _faults():
            return self._context.fork(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens."""
        with _faults():
            self._context.truncate(sequence, length)

    def release(self, sequence: int) -> None:
        with _faults():
            self._context.release(sequence)

    def length(self, sequence: int) -> int:
        with _faults():
            return self._context.length(sequence)

    def forward(self, steps: Sequence[Step]) -> list[NDArray[np.float32]]:
        """Logits of each step: (rows, vocab), with 0, 1 or len(tokens) rows."""
        arrays = [checked_tokens(step.tokens, self._vocab_size) for step in steps]
        slices = [(step.sequence, ids, step.logits) for step, ids in zip(steps, arrays, strict=True)]
        with _faults():
            logits = self._context.forward(slices)
        rows = {"none": lambda ids: 0, "last": lambda ids: 1, "all": len}
        ends = np.cumsum([rows[step.logits](ids) for step, ids in zip(steps, arrays, strict=True)])
        return np.split(logits, ends[:-1]) if steps else []

    def save(self, sequence: int) -> bytes:
        """Tokens and cache of a sequence, for `restore` into an engine over the same model in the same form."""
        with _faults():
            return self._context.save(sequence)

    def restore(self, saved: bytes) -> int:
        """A sequence as it was saved. Its pages are not offered to other sequences; fork it instead.

        Raises:
            InputError: bytes that are damaged, of other weights, another KV precision or another version, too long for
                this context, or no sequence or page free.
        """
        with _faults():
            return self._context.restore(saved)

    def pages(self) -> CachePages:
        """How the pages of the cache are used."""
        with _faults():
            return CachePages(*self._context.pages())

    def memory(self) -> EngineMemory:
        return EngineMemory(*self._context.memory())


@dataclass(frozen=True)
class CachePages:
    """Pages of 128 positions (fewer where the context is shorter): all, those that sequences hold, each counted once,
    and those that are kept for sequences which begin alike."""

    total: int
    held: int
    kept: int


@contextmanager
def _faults() -> Iterator[None]:
    """The engine's own errors as ours."""
    try:
        yield
    except _native.NativeError as fault:
        raise InputError(str(fault)) from None
    except MemoryError:
        raise EngineError(
            "There is not enough memory for the engine's cache and scratch. Ask for a shorter context, "
            "fewer sequences, or a smaller KV precision."
        ) from None
