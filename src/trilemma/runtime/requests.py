"""What every engine checks of a request before it runs: its tokens, and the context that it is opened with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import InputError
from trilemma.model.model import Model

DEFAULT_CONTEXT = 4096
"""Context of an engine when nobody asks for more: long enough to work, short enough not to fill a device."""


def checked_tokens(
    tokens: NDArray[np.int32] | Sequence[int], vocab_size: int, max_context: int | None = None
) -> NDArray[np.int32]:
    """The tokens as (n,) int32.

    Raises:
        InputError: none, one outside the vocabulary, or more than `max_context` where that is given.
    """
    ids = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if ids.size == 0:
        raise InputError("There are no tokens to run. Give at least one (the BOS token, say).")
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        bad = int(ids[outside][0])
        raise InputError(f"Token {bad} is outside the vocabulary 0..{vocab_size - 1}: wrong tokenizer?")
    if max_context is not None and ids.size > max_context:
        raise InputError(f"{ids.size} tokens do not fit the context of {max_context}. Shorten the text.")
    return ids.astype(np.int32)


def context_of(model: Model, asked: int | None) -> int:
    """The context asked for; the model's own up to DEFAULT_CONTEXT when none is.

    Raises:
        InputError: one that the model does not have.
    """
    longest = model.config.max_context
    if asked is None:
        return min(longest, DEFAULT_CONTEXT)
    if not 1 <= asked <= longest:
        raise InputError(
            f"A context of {asked} is not possible: the model's own is {longest}. Ask for 1 to {longest} tokens."
        )
    return asked
