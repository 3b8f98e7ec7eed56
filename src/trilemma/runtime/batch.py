"""Several prompts continued together: one forward a step for all of them.

Weights are read once a step for the whole batch, which is what makes throughput grow; each answer is
the one that its prompt gets alone, since results do not depend on the batch. Left out: requests that
arrive while others run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from trilemma.core.errors import InputError
from trilemma.runtime.engine import Engine, Generation, SamplingSettings
from trilemma.runtime.native import NativeEngine, SequenceBatch, Step
from trilemma.runtime.output import Output
from trilemma.runtime.sampling import choose


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
    able = batch_engine(engine)
    if not prompts:
        raise InputError("There are no prompts to continue. Give at least one.")
    outputs = [
        Output(prompt, settings, engine.config, engine.max_context, None if on_token is None else partial(on_token, at))
        for at, prompt in enumerate(prompts)
    ]
    room = sequences or able.open_sequences(len(prompts))
    held: list[int] = []
    try:
        for _ in prompts:
            held.append(room.create())
        _step_until_done(room, list(zip(held, outputs, strict=True)), settings)
    finally:
        for sequence in held:
            room.release(sequence)
    return [output.generation() for output in outputs]


def _step_until_done(room: SequenceBatch, running: list[tuple[int, Output]], settings: SamplingSettings) -> None:
    """One forward a step for all that go on: the whole prompt first, then the token that came last."""
    steps = [Step(sequence, output.seen) for sequence, output in running]
    while running:
        rows = room.forward(steps)
        running = [
            (sequence, output)
            for (sequence, output), logits in zip(running, rows, strict=True)
            if output.push(choose(logits[-1], output.seen, settings))
        ]
        steps = [Step(sequence, output.seen[-1:]) for sequence, output in running]


__all__ = ["batch_engine", "generate_batch"]
