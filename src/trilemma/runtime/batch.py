"""Several prompts continued together: one forward a step for all of them.

Weights are read once a step for the whole batch, which is what makes throughput grow; each answer is
the one that its prompt gets alone, since results do not depend on the batch. Left out: requests that
arrive while others run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import InputError
from trilemma.runtime.engine import Engine, Generation, SamplingSettings
from trilemma.runtime.native import NativeEngine, SequenceBatch, Step
from trilemma.runtime.output import Output
from trilemma.runtime.sampling import choose

LEAST_REPEATED = 64  # tokens: fewer are sooner computed with the others than after them


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
        prompts: token ids, of any lengths. What several begin with is computed once (`EngineOptions.share_prefixes`).
        settings: the same for each request; the seed too.
        on_token: called with (index of the prompt, token); returning False ends that request.
        sequences: room that is open already, for at least as many sequences, which shares prefixes or not; opened and
            freed here otherwise.

    Returns:
        One record a prompt. `token_times_s` are seconds from the beginning of the batch; a request that
        ends leaves the batch, the others go on.

    Raises:
        InputError: no prompts, an empty one, or one that fills the context.
    """
    able = batch_engine(engine)
    if not prompts:
        raise InputError("There are no prompts to continue. Give at least one.")
    outputs = [
        Output(prompt, settings, engine.config, engine.max_context, None if on_token is None else partial(on_token, at))
        for at, prompt in enumerate(prompts)
    ]
    room = sequences or able.open_sequences(len(prompts), share_prefixes=able.shares(True))
    held: list[int] = []
    try:
        running = _prefill(room, outputs, held, settings)
        _step_until_done(room, running, settings)
    finally:
        for sequence in held:
            room.release(sequence)
    return [output.generation() for output in outputs]


def _prefill(
    room: SequenceBatch, outputs: list[Output], held: list[int], settings: SamplingSettings
) -> list[tuple[int, Output]]:
    """The whole prompts, and the first token of each; returns those that go on.

    One forward for all, but where prefixes are shared, prompts that begin like one of them wait for the next.
    """
    running: list[tuple[int, Output]] = []
    waiting = outputs
    while waiting:
        wave: list[tuple[int, Output]] = []
        later: list[Output] = []
        for output in waiting:
            sequence, output.reused = room.begin(output.seen)
            if room.share_prefixes and _repeats(output, wave):
                room.release(sequence)
                later.append(output)
                continue
            held.append(sequence)
            wave.append((sequence, output))
        rows = room.forward([Step(sequence, output.seen[output.reused :]) for sequence, output in wave])
        running += _push(wave, rows, settings)
        waiting = later
    return running


def _repeats(output: Output, wave: list[tuple[int, Output]]) -> bool:
    """Whether it shares so much more with one of the wave than with what is in the cache that waiting pays."""
    least = output.reused + LEAST_REPEATED
    return any(_common(output.seen, other.seen) >= least for _, other in wave)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _step_until_done(room: SequenceBatch, running: list[tuple[int, Output]], settings: SamplingSettings) -> None:
    """One forward a step for all that go on, each with the token that came last."""
    while running:
        rows = room.forward([Step(sequence, output.seen[-1:]) for sequence, output in running])
        running = _push(running, rows, settings)


def _push(
    running: list[tuple[int, Output]], rows: list[NDArray[np.float32]], settings: SamplingSettings
) -> list[tuple[int, Output]]:
    """Each request's next token; those that go on."""
    return [
        (sequence, output)
        for (sequence, output), logits in zip(running, rows, strict=True)
        if output.push(choose(logits[-1], output.seen, settings))
    ]


__all__ = ["batch_engine", "generate_batch"]
