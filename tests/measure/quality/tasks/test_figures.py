"""Accuracies by hand, paired changes counted, and likelihoods against torch one request at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trilemma.core.errors import EngineError, InputError
from trilemma.measure.quality.loglikelihood import Likelihood, LikelihoodEngine, Request, encode_request
from trilemma.measure.quality.tasks.figures import TaskAnswers, answer_task, task_row
from trilemma.measure.quality.tasks.items import Task, TaskItem
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions

torch.set_num_threads(1)


def item(gold, lengths=(1, 10)):
    return TaskItem(tuple(("q", "x" * size) for size in lengths), gold, tuple(lengths))


def answers(*pairs):
    return TaskAnswers(tuple(tuple(Likelihood(nats, False) for nats in pair) for pair in pairs))


def test_accuracies_by_hand():
    """Nats -2, -5: the first is likelier; by character (1 and 10) the second is."""
    task = Task("t", "choices", (item(0), item(1), item(0), item(1)))
    row = task_row(task, answers((-2, -5), (-2, -5), (-9, -5), (-9, -5)), None, context=64)
    assert row.answers == (0, 0, 1, 1)
    assert row.measurements["accuracy/t"].value == 0.5
    assert row.measurements["accuracy_norm/t"].value == 0.5
    assert row.measurements["accuracy/t"].n == 4
    assert row.measurements["accuracy/t"].conditions["stderr"] == pytest.approx(np.std([1, 0, 0, 1], ddof=1) / 2)
    assert row.gained is None
    equal = task_row(Task("t", "choices", (item(1),)), answers((-3, -3)), None, context=64)
    assert equal.answers == (0,)  # numpy's argmax, as lm-eval


def test_changes_against_the_reference():
    task = Task("t", "contexts", tuple(item(0) for _ in range(5)))
    before = answers((-1, -2), (-2, -1), (-2, -1), (-1, -2), (-1, -2))
    after = answers((-1, -2), (-1, -2), (-1, -2), (-2, -1), (-1, -2))
    row = task_row(task, after, before, context=64)
    assert (row.gained, row.lost) == (2, 1)
    assert row.measurements["accuracy_change/t"].value == pytest.approx(0.2)
    assert "accuracy_norm/t" not in row.measurements


def test_a_continuation_counts_when_greedy_says_it():
    found = TaskAnswers(((Likelihood(-0.1, True),), (Likelihood(-0.1, False),)))
    row = task_row(Task("t", "continuation", (item(0, (1,)), item(0, (1,)))), found, None, context=64)
    assert row.answers == (1, 0)
    assert row.measurements["accuracy/t"].value == 0.5


def by_torch(engine, request):
    """The likelihood of one request from the whole row of logits, in float64."""
    ids = [*request.context, *request.continuation][-(engine.max_context + 1) :]
    rows = torch.log_softmax(torch.from_numpy(engine.logits(ids[:-1])).double(), -1)[-len(request.continuation) :]
    targets = torch.tensor(request.continuation)
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(1) == targets).all())


@pytest.mark.parametrize("kv", ["f32", "int8", "none"])
def test_shared_beginnings_change_nothing(tiny_model, random_generator, kv):
    """Prefixes of all kinds: equal inputs, one continuation the beginning of another, nothing in common, cut texts."""
    draw = lambda size: tuple(int(token) for token in random_generator.integers(0, 97, size))  # noqa: E731
    trunk = draw(20)
    groups = [
        [Request(trunk, draw(1)) for _ in range(4)],
        [Request(trunk, draw(size)) for size in (1, 3, 7, 2)],
        [Request(trunk, (5, 6)), Request(trunk, (5, 6, 7)), Request(trunk, (5,))],
        [Request(draw(5), draw(4)), Request(draw(9), draw(2))],
        [Request(trunk + draw(60), draw(3)), Request(trunk + draw(70), draw(5))],
        [Request(draw(1), draw(1))],
        [Request(trunk, draw(2)) for _ in range(19)],
        [Request((trunk * 4)[:64], draw(2)), Request((trunk * 4)[:64], draw(1))],
    ]
    engine = open_engine(tiny_model(seed=2), options=EngineOptions(threads=1, kv_cache=kv))
    with LikelihoodEngine(engine) as likelihoods:
        for group in groups:
            for request, found in zip(group, likelihoods.score(group), strict=True):
                nats, greedy = by_torch(engine, request)
                assert found.nats == pytest.approx(nats, abs=1e-5)
                assert found.greedy is greedy
        best = int(engine.logits(list(trunk))[-1].argmax())
        assert likelihoods.score([Request(trunk, (best,))])[0].greedy
        first, _ = likelihoods.score([Request(trunk, (best,)), Request(trunk, (0, 1))])
        assert first.greedy
    engine.close()


def test_engines_of_one_sequence_give_the_same(tiny_model, random_generator):
    model = tiny_model(seed=3)
    requests = [Request((1, 2, 3), (4, 5)), Request((1, 2, 3), (6,))]
    found = []
    for runtime in ("native", "torch"):
        engine = open_engine(model, runtime=runtime, options=EngineOptions(threads=1, kv_cache="f32"))
        found.append([one.nats for one in LikelihoodEngine(engine).score(requests)])
        engine.close()
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_what_does_not_fit_or_is_not_finite_is_refused(tiny_model, fake_engine, hearth_path):
    engine = open_engine(tiny_model(), options=EngineOptions(threads=1, max_context=8))
    tokenizer = Tokenizer.load(hearth_path)
    with pytest.raises(InputError, match="9 tokens does not fit the context of 8"):
        LikelihoodEngine(engine).score([Request((1,), (2,) * 9)])
    engine.close()
    broken = fake_engine(lambda tokens: np.full((len(tokens), 11), np.nan))
    with pytest.raises(EngineError, match="not finite"):
        LikelihoodEngine(broken).score([Request((1,), (2,))])
    task = Task("long", "continuation", (TaskItem((("a", " b" * 70),), 0, (1,)),))
    short = fake_engine(lambda tokens: np.zeros((len(tokens), 11)))
    with pytest.raises(InputError, match="Item 1 of the task 'long'"):
        answer_task(short, tokenizer, task)
    with pytest.raises(InputError, match="nothing to predict"):
        encode_request(tokenizer, "", "")
