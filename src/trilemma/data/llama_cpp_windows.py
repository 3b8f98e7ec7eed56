"""The windows that llama.cpp's perplexity tool scores, so that figures can be compared with its own.

The text is one row of tokens, cut into chunks of exactly the context; what does not fill the last one is
dropped. Where the tokenizer adds a BOS it takes the place of each chunk's first token. Only the predictions from
logit context/2 on are scored: context - 1 - context/2 of them a chunk
(https://github.com/ggml-org/llama.cpp, tools/perplexity/perplexity.cpp, without --ppl-stride).
Left out: its --ppl-stride, and the escapes (a backslash and n) that its command line replaces in the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trilemma.core.errors import DataError
from trilemma.data.windows import Decode, Encode, TokenSet, text_amounts


def llama_cpp_windows(
    text: str,
    encode: Encode,
    context: int,
    max_tokens: int | None = None,
    *,
    bos: Sequence[int] = (),
    decode: Decode,
    domain: str = "text",
) -> TokenSet:
    """Chunks of `context` tokens of which the second half is scored; each stands as a document of its own.

    Args:
        text: everything, as one; one line break at its end is dropped, as the tool does.
        encode: text to token ids, without BOS.
        context: tokens of a chunk, at least 4.
        max_tokens: whole chunks up to there, from the beginning of the text.
        bos: what the tokenizer puts in front of a text; empty where it adds nothing.
        decode: token ids to text, for bytes and words.

    Raises:
        DataError: fewer than two chunks (the tool refuses these too), or a context below 4.
    """
    if context < 4:
        raise DataError(f"A context of {context} tokens leaves no second half to score; give at least 4.")
    ids = np.asarray([*bos, *encode(text.removesuffix("\n"))], np.int32)
    chunks = len(ids) // context
    if chunks < 2:
        raise DataError(
            f"llama.cpp's protocol needs at least two windows of {context} tokens; the text has {len(ids)} tokens. "
            "Give more text, or a shorter context."
        )
    chunks = max(1, min(chunks, (max_tokens or len(ids)) // context))
    windows = ids[: chunks * context].reshape(chunks, context).copy()
    if bos:
        windows[:, 0] = bos[0]
    lead = context // 2
    text_bytes, text_words = np.asarray([text_amounts(window, lead, decode) for window in windows], np.float64).T
    return TokenSet(
        tuple(windows), np.arange(chunks), text_bytes, context,
        tuple(f"{domain}, window {number}" for number in range(1, chunks + 1)), (domain,) * chunks,
        np.full(chunks, lead, np.int64), text_words, None, "llama.cpp",
    )  # fmt: skip
