"""The timed cases of a diagnosis: a request, a prompt alone, steps of a batch, several tokens verified at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from trilemma.measure.timing.interleave import Case
from trilemma.runtime.engine import SamplingSettings
from trilemma.runtime.native import NativeEngine, SequenceBatch, Step

_STEPS = 16


def request(engine: NativeEngine, prompt_tokens: int, output_tokens: int) -> Case:
    """Seconds to the first token ('prefill') and between tokens after it ('decode')."""
    prompt = _prompt(engine, prompt_tokens)
    settings = SamplingSettings(max_tokens=output_tokens, ignore_eos=True)

    def run() -> Mapping[str, float]:
        times = engine.generate(prompt, settings).token_times_s
        return {"prefill": times[0], "decode": (times[-1] - times[0]) / (len(times) - 1)}

    return run


def prompt_only(engine: NativeEngine, prompt_tokens: int) -> Case:
    """'prefill': seconds from a prompt of so many tokens to the first token of the answer."""
    prompt = _prompt(engine, prompt_tokens)
    settings = SamplingSettings(max_tokens=1, ignore_eos=True)
    return lambda: {"prefill": engine.generate(prompt, settings).token_times_s[0]}


def batch(engine: NativeEngine, count: int, prompt_tokens: int, output_tokens: int) -> Case:
    """Seconds of one step in which `count` sequences get a token each, after prompts of the same length."""
    sequences, numbers = _filled(engine, count, prompt_tokens, output_tokens)
    steps = [Step(number, [1]) for number in numbers]
    return _stepped(sequences, steps, numbers, prompt_tokens, max(1, min(_STEPS, output_tokens)))


def verify(engine: NativeEngine, tokens: int, prompt_tokens: int, output_tokens: int) -> Case:
    """Seconds of one pass that reads `tokens` tokens of one sequence, as speculation does."""
    sequences, numbers = _filled(engine, 1, prompt_tokens, output_tokens)
    steps = [Step(numbers[0], [1] * tokens, "all")]
    return _stepped(sequences, steps, numbers, prompt_tokens, max(1, min(_STEPS, output_tokens // tokens)))


def _filled(
    engine: NativeEngine, count: int, prompt_tokens: int, output_tokens: int
) -> tuple[SequenceBatch, list[int]]:
    sequences = engine.open_sequences(count, max_context=prompt_tokens + output_tokens)
    numbers = [sequences.create() for _ in range(count)]
    for number in numbers:
        sequences.forward([Step(number, _prompt(engine, prompt_tokens), "none")])
    return sequences, numbers


def _stepped(
    sequences: SequenceBatch, steps: list[Step], numbers: list[int], length: int, count: int
) -> Callable[[], Mapping[str, float]]:
    def run() -> Mapping[str, float]:
        began = time.perf_counter()
        for _ in range(count):
            sequences.forward(steps)
        seconds = (time.perf_counter() - began) / count
        for number in numbers:
            sequences.truncate(number, length)
        return {"decode": seconds}

    return run


def _prompt(engine: NativeEngine, tokens: int) -> list[int]:
    return [1 + index % max(1, engine.config.vocab_size - 1) for index in range(tokens)]
