"""What a search will do with its time: lengths, amounts of text, and what it keeps back for the confirm run."""

from __future__ import annotations

import time

from trilemma.core.errors import InputError, LimitError
from trilemma.core.limit import Limit
from trilemma.core.record import Record
from trilemma.model.config import DecoderConfig
from trilemma.runtime.engine import Engine
from trilemma.search.decide import Objective
from trilemma.search.workbench import Lengths

DEFAULT_CONTEXT = 512
MOST_SELECT_TOKENS, MOST_CONFIRM_TOKENS = 16_384, 32_768
LEAST_WINDOWS = 8  # fewer documents make no interval worth the name
MEASURED = frozenset(
    {"weights_bytes", "artifact_bytes", "engine_memory_bytes", "peak_memory_bytes", "kv_bytes_per_token", "ttft_s",
     "tpot_s", "itl_s", "itl_p99_s", "prefill_tokens_per_s", "decode_tokens_per_s", "energy_j_per_output_token",
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


class TextPlan(Record):
    """Tokens of the select and confirm texts, and the seconds that the confirm text takes.

    confirm_s: of one pass of the unmodified model as the reference and one of the chosen model;
    least_tokens: what a verdict on quality needs at least.
    """

    select_tokens: int
    confirm_tokens: int
    confirm_s: float
    least_tokens: int

    def confirm_within(self, seconds: float) -> int:
        """Tokens of confirm text that can be scored in that time, at most as many as planned; 0: too few to judge."""
        tokens = min(self.confirm_tokens, int(self.confirm_tokens * seconds / self.confirm_s))
        return tokens if tokens >= self.least_tokens else 0


def plan_text(rate: float, limit_s: float, context: int) -> TextPlan:
    """As much text as the time allows, given the unmodified model's tokens per second."""
    affordable, least = rate * limit_s * _SHARE_PER_PASS, LEAST_WINDOWS * context
    select = int(max(least, min(MOST_SELECT_TOKENS, affordable)))
    confirm = int(max(least, min(MOST_CONFIRM_TOKENS, 1.5 * affordable)))
    return TextPlan(select_tokens=select, confirm_tokens=confirm, confirm_s=2 * confirm / rate, least_tokens=least)


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
                f"The limit '{limit.text}' can not be checked: the search does not measure {limit.metric}"
                f"{' without --device' if limit.metric == 'battery_h' else ''}. "
                f"It measures {', '.join(sorted(measured))}."
            )
    if objective.metric not in measured:
        raise LimitError(
            f"Can not minimise {objective.metric}: the search does not measure it. "
            f"It measures {', '.join(sorted(measured))}."
        )
