"""What a search will do with its time: lengths, amounts of text, and what it keeps back for the confirm run."""

from __future__ import annotations

import time
from dataclasses import dataclass

from trilemma.core.errors import InputError, LimitError
from trilemma.core.limit import Limit
from trilemma.model.config import DecoderConfig
from trilemma.runtime.engine import Engine
from trilemma.search.decide import Objective
from trilemma.search.workbench import Lengths

DEFAULT_CONTEXT = 512
MOST_SELECT_TOKENS, MOST_CONFIRM_TOKENS, LEAST_TOKENS = 16_384, 32_768, 2_048
MEASURED = frozenset(
    {"weights_bytes", "artifact_bytes", "engine_memory_bytes", "peak_memory_bytes", "kv_bytes_per_token", "ttft_s",
     "tpot_s", "itl_s", "prefill_tokens_per_s", "decode_tokens_per_s", "energy_j_per_output_token",
     "energy_j_per_total_token", "power_w", "perplexity", "bits_per_byte", "ppl_increase", "kl_mean", "kl_p99",
     "kl_p999", "top1_agreement"}
)  # fmt: skip
_SHARE_PER_PASS = 0.05  # of the whole time, for one pass of the unmodified model over the select text


def plan_lengths(config: DecoderConfig, context: int | None) -> Lengths:
    """Raises InputError when the context is longer than the model's."""
    if context is not None and not 8 <= context <= config.max_context:
        raise InputError(f"A context of {context} does not fit: the model takes 8 to {config.max_context} tokens.")
    length = context or min(DEFAULT_CONTEXT, config.max_context)
    return Lengths(
        context=length, prompt_tokens=min(128, length // 2), output_tokens=max(2, min(48, length // 4)), repetitions=5
    )


@dataclass(frozen=True)
class TextPlan:
    """Tokens of the select and confirm texts, and the seconds that a pass over the confirm text takes."""

    select_tokens: int
    confirm_tokens: int
    confirm_s: float


def plan_text(rate: float, limit_s: float) -> TextPlan:
    """As much text as the time allows, given the unmodified model's tokens per second."""
    affordable = rate * limit_s * _SHARE_PER_PASS
    select = int(min(MOST_SELECT_TOKENS, max(LEAST_TOKENS, affordable)))
    confirm = int(min(MOST_CONFIRM_TOKENS, max(LEAST_TOKENS, 1.5 * affordable)))
    return TextPlan(select, confirm, 2 * confirm / rate)


def prefill_rate(engine: Engine, context: int) -> float:
    """Tokens per second of a whole window with all logits, as quality is measured; second of two passes."""
    tokens = [1 + index % (engine.config.vocab_size - 1) for index in range(context)]
    engine.logits(tokens)
    began = time.perf_counter()
    engine.logits(tokens)
    return context / (time.perf_counter() - began)


def require_measurable(limits: tuple[Limit, ...], objective: Objective, measured: frozenset[str]) -> None:
    """Refuse limits and objectives on what a search does not measure, before any work.

    Raises:
        LimitError: names the metric and what can be limited.
    """
    for limit in limits:
        if limit.metric not in measured:
            raise LimitError(
                f"The limit '{limit.text}' can not be checked: the search does not measure {limit.metric}. "
                f"It measures {', '.join(sorted(measured))}."
            )
    if objective.metric not in measured:
        raise LimitError(
            f"Can not minimise {objective.metric}: the search does not measure it. "
            f"It measures {', '.join(sorted(measured))}."
        )
