"""Reading the numbers of a mixture of experts from config.json; Mixtral and Qwen3-MoE share it."""

from __future__ import annotations

from trilemma.core.errors import CheckpointError
from trilemma.model.config import Experts
from trilemma.model.families import fields


def read_experts(raw: fields.Raw, count_keys: tuple[str, ...], hidden_key: str, *, normalized: bool) -> Experts:
    """The Experts of a config.json whose chosen experts are weighted by a softmax.

    Args:
        count_keys: names that the number of experts goes by, the usual one first.
        hidden_key: of an expert's width.
        normalized: whether weights of the chosen experts sum to 1.

    Raises:
        CheckpointError: a number is missing, or more experts are to run than there are.
    """
    key = next((key for key in count_keys if raw.get(key) is not None), count_keys[0])
    count = fields.positive_int(raw, key)
    active = fields.positive_int(raw, "num_experts_per_tok")
    if active > count:
        raise CheckpointError(
            f"config.json: 'num_experts_per_tok' is {active}, but there are {count} experts ('{key}')."
        )
    return Experts(
        count=count, active=active, hidden=fields.positive_int(raw, hidden_key),
        gates="normalized" if normalized else "softmax",
    )  # fmt: skip
