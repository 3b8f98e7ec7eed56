"""How likely a model finds a continuation after a context: what log-likelihood tasks and lm-eval ask for.

Texts become tokens as in lm-eval (https://github.com/EleutherAI/lm-evaluation-harness, api/model.py and
models/huggingface.py of 0.4.13): white space at the end of the context goes to the continuation, both are encoded
as one text and split where the encoded context ends, and what is too long is cut at the left.
Requests that begin alike run their common beginning once, where the engine runs several sequences; results do not
depend on that, since the engine's do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import InputError
from trilemma.measure.quality.reference_store import require_finite
from trilemma.measure.quality.token_scores import log_normalizer, token_nll
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime.batch import batch_engine
from trilemma.runtime.engine import Engine
from trilemma.runtime.native import SequenceBatch, Step

Float32 = NDArray[np.float32]
MOST_SEQUENCES = 8  # that are held at a time beside the common beginning


@dataclass(frozen=True)
class Request:
    """Token ids of a context and of what is to follow it; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def inputs(self, longest: int) -> list[int]:
        """What the model reads, cut at the left to `longest` tokens; the last token is only predicted.

        Raises:
            InputError: the continuation alone is longer.
        """
        if len(self.continuation) > longest:
            raise InputError(
                f"A continuation of {len(self.continuation)} tokens does not fit the context of {longest}. "
                "Give a longer context, or leave the item out."
            )
        return [*self.context, *self.continuation][-(longest + 1) : -1]

    def is_cut(self, longest: int) -> bool:
        return len(self.context) + len(self.continuation) > longest + 1


class Likelihood(NamedTuple):
    """nats: log-likelihood of the continuation; greedy: whether each of its tokens is the most likely one."""

    nats: float
    greedy: bool


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids with BOS as the tokenizer adds it, unless the text begins with the prefix token already."""
    prefix = prefix_token(tokenizer)
    return tokenizer.encode(text, special=prefix is None or not text.startswith(prefix))


def encode_request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """A context and its continuation as tokens; after an empty context comes the prefix token (BOS, else EOS).

    Raises:
        InputError: nothing to predict, or an empty context for a tokenizer without BOS and EOS.
    """
    if not context:
        return _after_prefix(tokenizer, continuation)
    stem = context.rstrip()
    whole = encode_text(tokenizer, context + continuation)
    head = encode_text(tokenizer, stem)
    request = Request(tuple(head), tuple(whole[len(head) :]))
    if not request.context or not request.continuation:
        raise InputError(f"There is nothing to predict: the continuation {continuation!r} adds no token.")
    return request


def prefix_token(tokenizer: Tokenizer) -> str | None:
    """The text of the token that stands before an empty context."""
    return tokenizer.special_text("bos_token") or tokenizer.special_text("eos_token")


def prefix_id(tokenizer: Tokenizer) -> int:
    """Its id. Raises InputError where the tokenizer names neither BOS nor EOS."""
    text = prefix_token(tokenizer)
    found = None if text is None else tokenizer.token_id(text)
    if found is None:
        raise InputError(
            "The tokenizer names neither a BOS nor an EOS token, so nothing can stand before the first token. "
            "Name one in tokenizer_config.json."
        )
    return found


class LikelihoodEngine:
    """An engine that is asked for log-likelihoods; a context manager, which frees what it opened beside the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._room: SequenceBatch | None = None
        self._longest = 0

    def score(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Likelihoods of requests that may begin alike: the answers to one question, say.

        Raises:
            InputError: a continuation longer than the engine's context, or tokens outside the vocabulary.
            EngineError: logits that are not finite.
        """
        inputs = [request.inputs(self.engine.max_context) for request in requests]
        # Row p predicts token p + 1, so the beginning may reach to the first row that somebody needs.
        shared = min(
            _common_length(inputs),
            *(len(ids) - len(request.continuation) + 1 for ids, request in zip(inputs, requests, strict=True)),
        )
        if len(inputs) == 1 or shared < 1 or not hasattr(self.engine, "open_sequences"):
            rows = [self.engine.logits(ids) for ids in inputs]
        else:
            rows = self._after_beginning(inputs, shared)
        return [self._likelihood(request, found) for request, found in zip(requests, rows, strict=True)]

    def _after_beginning(self, inputs: Sequence[list[int]], shared: int) -> list[Float32]:
        """The logits of each input from the last token of their common beginning on."""
        room = self._open(max(len(ids) for ids in inputs))
        trunk, held = room.begin(inputs[0][:shared])  # of an earlier question: examples that stand before all of them
        try:
            (last,) = room.forward([Step(trunk, inputs[0][held:shared], "last")])
            rows: list[Float32] = [last] * len(inputs)
            longer = [at for at, ids in enumerate(inputs) if len(ids) > shared]
            for start in range(0, len(longer), MOST_SEQUENCES):
                chosen = longer[start : start + MOST_SEQUENCES]
                branches = [room.fork(trunk) for _ in chosen]
                steps = [Step(branch, inputs[at][shared:], "all") for branch, at in zip(branches, chosen, strict=True)]
                try:
                    for at, found in zip(chosen, room.forward(steps), strict=True):
                        rows[at] = np.concatenate([last, found])
                finally:
                    for branch in branches:
                        room.release(branch)
        finally:
            room.release(trunk)
        return rows

    def _open(self, longest: int) -> SequenceBatch:
        if self._room is None or longest > self._longest:
            self._room = None  # freed before the larger one is taken
            self._longest = min(self.engine.max_context, max(longest, 2 * self._longest, 64))
            able = batch_engine(self.engine)
            self._room = able.open_sequences(
                MOST_SEQUENCES + 1, max_context=self._longest, share_prefixes=able.shares(True)
            )
        return self._room

    def _likelihood(self, request: Request, logits: Float32) -> Likelihood:
        targets = np.asarray(request.continuation, np.int32)
        rows = logits[-len(targets) :]
        normalizer = log_normalizer(rows)
        require_finite(normalizer, 0, self.engine)
        nats = -float(token_nll(rows, targets, normalizer).sum())
        return Likelihood(nats, bool((rows.argmax(axis=1) == targets).all()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._room = None


def _after_prefix(tokenizer: Tokenizer, continuation: str) -> Request:
    ids = tokenizer.encode(continuation, special=False)
    first = prefix_id(tokenizer)
    if ids[:1] == [first]:
        ids = ids[1:]  # the continuation begins with it already
    if not ids:
        raise InputError(f"There is nothing to predict: the continuation {continuation!r} has no tokens.")
    return Request((first,), tuple(ids))


def _common_length(inputs: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with alike."""
    first, *others = inputs
    length = len(first)
    for other in others:
        length = min(length, len(other))
        length = next((at for at in range(length) if first[at] != other[at]), length)
    return length
