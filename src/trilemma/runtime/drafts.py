"""Where proposed tokens come from: a smaller model, or the text itself.

A draft may propose anything; the target decides (`speculative.py`), so a bad draft costs time and
never changes the output. Both drafts here propose one chain of tokens; trees are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from trilemma.core.errors import InputError
from trilemma.runtime.engine import SamplingSettings, settle
from trilemma.runtime.native import NativeEngine, SequenceBatch, Step
from trilemma.runtime.sampling import choose

LONGEST_NGRAM, SHORTEST_NGRAM = 4, 2


class Draft(Protocol):
    """Proposes how a text goes on. `name` is for people."""

    name: str

    def begin(self) -> None:
        """Forget the request before."""
        ...

    def propose(self, seen: Sequence[int], count: int, settings: SamplingSettings) -> list[int]:
        """At most `count` tokens that may follow `seen`, which only grows within a request; [] when none is known."""
        ...

    def close(self) -> None: ...


class LookupDraft:
    """Prompt look-up (Saxena 2023, "Prompt lookup decoding"): what followed the last time these tokens came.

    The longest of the last `longest` to `shortest` tokens that occurred before is looked up in prompt and
    output; the most recent occurrence wins. Each position is indexed once, so a proposal costs
    microseconds whatever the length. It pays where the output copies: edits, extraction, code, lists, loops.
    """

    name = "look-up"

    def __init__(self, longest: int = LONGEST_NGRAM, shortest: int = SHORTEST_NGRAM) -> None:
        if not 1 <= shortest <= longest:
            raise InputError(
                f"N-grams of {shortest} to {longest} tokens can not be looked up; give 1 <= least <= most."
            )
        self._sizes = range(longest, shortest - 1, -1)
        self.begin()

    def begin(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> position after its latest occurrence
        self._indexed = 0

    def propose(self, seen: Sequence[int], count: int, settings: SamplingSettings) -> list[int]:
        self._index(seen)
        for size in self._sizes:
            after = self._follows.get(tuple(seen[-size:])) if len(seen) >= size else None
            if after is not None:
                return _copy(seen, after, count)
        return []

    def close(self) -> None:
        self.begin()

    def _index(self, seen: Sequence[int]) -> None:
        """N-grams that end before the last token: the tail must not find itself."""
        for end in range(self._indexed + 1, len(seen)):
            for size in self._sizes:
                if size <= end:
                    self._follows[tuple(seen[end - size : end])] = end
        self._indexed = max(self._indexed, len(seen) - 1)


def _copy(seen: Sequence[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on, going on into the copy itself where the text ends (a loop repeats)."""
    found: list[int] = []
    for index in range(start, start + count):
        found.append(seen[index] if index < len(seen) else found[index - len(seen)])
    return found


class ModelDraft:
    """A smaller model with the same vocabulary continues the text by itself.

    With temperature it draws with the target's own numbers (`sampling.uniform` depends on seed and position
    alone), so that the two agree as often as their distributions let them.

    Args:
        engine: an open native engine; closed with the draft.
        vocab_size: the target's; a padded end of the draft's vocabulary is never proposed.
        max_context: the target's; beyond the draft's own nothing is proposed.
    """

    def __init__(self, engine: NativeEngine, vocab_size: int, max_context: int, name: str = "draft model") -> None:
        self.name = name
        self.engine = engine
        self._vocab = min(vocab_size, engine.config.vocab_size)
        self._room = min(max_context, engine.max_context)
        self._batch: SequenceBatch = engine.open_sequences(1, max_context=self._room)
        self._sequence = self._batch.create()
        self.begin()

    def begin(self) -> None:
        self._batch.truncate(self._sequence, 0)
        self._right = 0  # tokens of the sequence that belonged to `seen` when it was last asked
        self._proposed: list[int] = []

    def propose(self, seen: Sequence[int], count: int, settings: SamplingSettings) -> list[int]:
        count = min(count, self._room + 1 - len(seen))
        if count < 1 or seen[-1] >= self._vocab:
            return []
        fed = self._keep_what_came_true(seen)
        text, step = list(seen), list(seen[fed:])
        while True:
            logits = self._batch.forward([Step(self._sequence, step)])[0][0, : self._vocab]
            token = choose(logits, text, settings)
            text.append(token)
            if len(text) == len(seen) + count:
                break
            step = [token]
        self._right, self._proposed = len(seen), text[len(seen) :]
        return self._proposed

    def close(self) -> None:
        self.engine.close()

    def settle(self) -> None:
        settle(self.engine)

    def _keep_what_came_true(self, seen: Sequence[int]) -> int:
        """Drop what was proposed and refused; returns how many tokens of `seen` the sequence holds."""
        fed = self._right
        for token in self._proposed[:-1]:  # the last one was proposed but never fed
            if fed >= len(seen) - 1 or seen[fed] != token:
                break
            fed += 1
        self._batch.truncate(self._sequence, fed)
        return fed
