"""Several prompts continued together: one forward a step for all of them.

Weights are read once a step for the whole batch, which is what makes throughput grow; each answer is
the one that its prompt gets alone, since results do not depend on the batch. Left out: requests that
arrive while others run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from trilemma.core.errors import InputError
from trilemma.runtime.engine import Engine, Generation, SamplingSettings
from trilemma.runtime.native import NativeEngine, SequenceBatch, Step
from trilemma.runtime.sampling import check_sampling, choose

FinishReason = Literal["length", "stop", "context", "interrupted"]


@dataclass
class _Request:
    """One prompt on its way. `fed` counts the tokens that the engine has seen."""

    sequence: int
    seen: list[int]
    result: Generation
    fed: int = 0


def batch_engine(engine: Engine) -> NativeEngine:
    """The engine as one that runs several sequences at once.

    Raises:
        InputError: it runs one sequence at a time.
    """
    if not hasattr(engine, "open_sequences"):
        raise InputError(
            f"The engine '{engine.name}' runs one sequence at a time; choose the native one for batches and depths."
        )
    return cast(NativeEngine, engine)


def generate_batch(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    on_token: Callable[[int, int], bool | None] | None = None,
    *,
    sequences: SequenceBatch | None = None,
) -> list[Generation]:
    """Continue each prompt; the tokens are those that each would get alone.

    Args:
        engine: one with `open_sequences` (native).
        prompts: token ids, of any lengths; all are prefilled in one call.
        settings: the same for each request; the seed too.
        on_token: called with (index of the prompt, token); returning False ends that request.
        sequences: room that is open already, for at least as many sequences; opened and freed here otherwise.

    Returns:
        One record a prompt. `token_times_s` are seconds from the beginning of the batch; a request that
        ends leaves the batch, the others go on.

    Raises:
        InputError: no prompts, an empty one, or one that fills the context.
    """
    check_sampling(settings)
    able = batch_engine(engine)
    if not prompts:
        raise InputError("There are no prompts to continue. Give at least one.")
    longest = max(len(prompt) for prompt in prompts)
    if longest >= engine.max_context:
        raise InputError(f"A prompt of {longest} tokens fills the context of {engine.max_context}; shorten it.")
    if any(len(prompt) == 0 for prompt in prompts):
        raise InputError("A prompt has no tokens. Give at least one (the BOS token, say).")
    room = sequences or able.open_sequences(len(prompts))
    requests: list[_Request] = []
    stops = set(settings.stop_token_ids) | (set() if settings.ignore_eos else set(engine.config.eos_token_ids))
    try:
        for prompt in prompts:
            requests.append(_Request(room.create(), list(prompt), Generation([], "length", len(prompt))))
        _step_until_done(room, requests, settings, frozenset(stops), engine.max_context, on_token)
    finally:
        for request in requests:
            room.release(request.sequence)
    return [request.result for request in requests]


def _step_until_done(
    room: SequenceBatch,
    requests: list[_Request],
    settings: SamplingSettings,
    stops: frozenset[int],
    max_context: int,
    on_token: Callable[[int, int], bool | None] | None,
) -> None:
    began = time.perf_counter()
    running = list(enumerate(requests))
    while running:
        rows = room.forward([Step(request.sequence, request.seen[request.fed :]) for _, request in running])
        kept = []
        for (index, request), logits in zip(running, rows, strict=True):
            request.fed = len(request.seen)
            token = choose(logits[-1], request.seen, settings)
            reason = _take(request, token, settings, stops, max_context, time.perf_counter() - began)
            if reason != "stop" and on_token is not None and on_token(index, token) is False:
                reason = "interrupted"
            if reason is None:
                kept.append((index, request))
            else:
                old = request.result
                request.result = Generation(old.tokens, cast(Any, reason), old.prompt_tokens, old.token_times_s)
        running = kept


def _take(
    request: _Request, token: int, settings: SamplingSettings, stops: frozenset[int], max_context: int, now_s: float
) -> FinishReason | None:
    """Add a token to a request; why it ends with it, or None."""
    if token in stops:
        return "stop"
    request.seen.append(token)
    request.result.tokens.append(token)
    request.result.token_times_s.append(now_s)
    if len(request.result.tokens) >= settings.max_tokens:
        return "length"
    return "context" if len(request.seen) >= max_context else None


__all__ = ["batch_engine", "generate_batch"]
