"""Lengths and amounts of text within a time, and what can not be searched for."""

import pytest

from trilemma.core.errors import InputError, LimitError
from trilemma.core.limit import Limit
from trilemma.search.decide import objective_for
from trilemma.search.plan import MEASURED, plan_lengths, plan_text, require_measurable


def test_lengths_fit_the_model(tiny_model):
    for context in (64, 700):
        config = tiny_model(context=context).config
        found = plan_lengths(config, None)
        assert found.context == min(512, context)
        assert found.prompt_tokens + found.output_tokens <= found.context
    assert plan_lengths(config, 40).context == 40
    for wrong in (7, 701, 0, -1):
        with pytest.raises(InputError, match="8 to 700"):
            plan_lengths(config, wrong)


def test_more_time_never_means_less_text():
    plans = [plan_text(5_000, seconds, 512) for seconds in (0.1, 5, 20, 60, 300, 3600, 1e6)]
    for metric in ("select_tokens", "confirm_tokens"):
        amounts = [getattr(plan, metric) for plan in plans]
        assert amounts == sorted(amounts)
    assert plans[0].select_tokens == plans[0].least_tokens == 8 * 512
    assert plans[-1] == plan_text(5_000, 1e9, 512)


def test_a_context_of_many_tokens_still_gives_eight_windows():
    plan = plan_text(100, 1, 8192)
    assert plan.select_tokens == plan.confirm_tokens == 8 * 8192


def test_the_confirm_text_shrinks_with_the_time_left_and_then_is_too_little():
    plan = plan_text(5_000, 120, 512)
    assert plan.confirm_within(10 * plan.confirm_s) == plan.confirm_tokens
    half = plan.confirm_within(plan.confirm_s / 2)
    assert half == pytest.approx(plan.confirm_tokens / 2, abs=1)
    assert plan.confirm_within(plan.confirm_s * plan.least_tokens / plan.confirm_tokens * 0.99) == 0
    assert plan.confirm_within(-5) == 0


def test_limits_and_objectives_on_what_is_not_measured_are_refused():
    limits = (Limit.parse("weights<=50%"),)
    require_measurable(limits, objective_for(limits), MEASURED)
    for text in ("accuracy/hellaswag>=40%", "battery>=3h"):
        with pytest.raises(LimitError, match="does not measure"):
            require_measurable((Limit.parse(text),), objective_for(()), MEASURED)
    with pytest.raises(LimitError, match="minimise battery_h"):
        require_measurable((), objective_for((), "battery_h"), MEASURED)
