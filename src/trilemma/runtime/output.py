"""The output of one request as it grows: which tokens there are, when each came, and when it is over.

Loops that feed an engine step by step (batches, speculation, cascades) share it, so that they end exactly
where `Engine.generate` does. Left out: how a token is chosen (`sampling.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from trilemma.core.errors import InputError
from trilemma.model.config import DecoderConfig
from trilemma.runtime.engine import FinishReason, Generation, SamplingSettings
from trilemma.runtime.sampling import check_sampling


class Output:
    """Prompt and output tokens of one request.

    Args:
        prompt: token ids; at least one, and fewer than `room`.
        config: of the model, for its end-of-text ids.
        room: tokens that the context holds.
        on_token: sees each token; returning False ends the request.

    Attributes:
        seen: prompt and output tokens; finished: why it is over, or None.
        reused: tokens of the prompt that were in the cache already, for whoever fed them to say.

    Raises:
        InputError: a setting out of range, an empty prompt, or one that fills the context.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        settings: SamplingSettings,
        config: DecoderConfig,
        room: int,
        on_token: Callable[[int], bool | None] | None = None,
    ) -> None:
        check_sampling(settings)
        if not len(prompt):
            raise InputError("The prompt has no tokens. Give at least one.")
        if len(prompt) >= room:
            raise InputError(f"The prompt's {len(prompt)} tokens fill the context of {room}; shorten it.")
        self.seen = [int(token) for token in prompt]
        self.finished: FinishReason | None = None
        self.reused = 0
        self._prompt_tokens = len(prompt)
        self._limit = settings.max_tokens
        self._room = room
        self._stops = frozenset(settings.stop_token_ids) | frozenset(
            () if settings.ignore_eos else config.eos_token_ids
        )
        self._on_token = on_token
        self._times_s: list[float] = []
        self._begun = time.perf_counter()

    @property
    def count(self) -> int:
        """Output tokens so far."""
        return len(self._times_s)

    @property
    def most(self) -> int:
        """Output tokens that may still come before length or context ends the request."""
        return min(self._limit - self.count, self._room - len(self.seen))

    def push(self, token: int) -> bool:
        """Take the next token, in the order of `Engine.generate`; False when the request is over."""
        if token in self._stops:
            self.finished = "stop"
            return False
        self.seen.append(token)
        self._times_s.append(time.perf_counter() - self._begun)
        if self._on_token is not None and self._on_token(token) is False:
            self.finished = "interrupted"
        elif self.count >= self._limit:
            self.finished = "length"
        elif len(self.seen) >= self._room:
            self.finished = "context"
        return self.finished is None

    def generation(self) -> Generation:
        """The record of the finished request."""
        assert self.finished is not None
        return Generation(
            self.seen[self._prompt_tokens :], self.finished, self._prompt_tokens, list(self._times_s), self.reused
        )
