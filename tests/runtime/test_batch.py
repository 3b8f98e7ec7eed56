"""Batches: every prompt gets the tokens that it gets alone, whatever stands beside it."""

from __future__ import annotations

import pytest

from trilemma.core.errors import InputError
from trilemma.runtime import open_engine
from trilemma.runtime.batch import generate_batch
from trilemma.runtime.engine import EngineOptions, SamplingSettings


def prompts_of(generator, vocab, lengths):
    return [generator.integers(0, vocab, int(length)).tolist() for length in lengths]


@pytest.fixture
def engine(tiny_model):
    opened = open_engine(tiny_model(seed=5, context=40), options=EngineOptions(threads=1))
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(max_tokens=9, ignore_eos=True),
        SamplingSettings(max_tokens=9, temperature=1.3, top_p=0.95, seed=11, repetition_penalty=1.2, ignore_eos=True),
    ],
    ids=["greedy", "sampled"],
)
@pytest.mark.parametrize("kv", ["none", "bf16", "int8", "int4"])
def test_equal_to_one_by_one(tiny_model, random_generator, settings, kv):
    engine = open_engine(tiny_model(seed=5), options=EngineOptions(threads=1, kv_cache=kv))
    prompts = prompts_of(random_generator, 97, random_generator.integers(1, 30, 5))
    together = generate_batch(engine, prompts, settings)
    for prompt, found in zip(prompts, together, strict=True):
        alone = engine.generate(prompt, settings)
        assert found.tokens == alone.tokens
        assert found.finish_reason == alone.finish_reason == "length"
        assert found.prompt_tokens == len(prompt)
        assert len(found.token_times_s) == 9
        assert found.token_times_s == sorted(found.token_times_s)
    engine.close()


def test_requests_leave_when_they_end(engine, random_generator):
    prompts = prompts_of(random_generator, 97, (3, 36, 7))
    free = generate_batch(engine, prompts, SamplingSettings(max_tokens=20, ignore_eos=True))
    assert [one.finish_reason for one in free] == ["length", "context", "length"]
    assert len(free[1].tokens) == 4  # 36 + 4 fill the context of 40
    stop = free[0].tokens[5]
    cut = SamplingSettings(max_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    found = generate_batch(engine, prompts, cut)
    assert found[0].finish_reason == "stop"
    assert found[0].tokens == free[0].tokens[: free[0].tokens.index(stop)]
    for one, whole in zip(found, free, strict=True):
        assert one.tokens == whole.tokens[: len(one.tokens)]


def test_a_request_can_be_stopped_from_outside(engine, random_generator):
    prompts = prompts_of(random_generator, 97, (4, 5))
    seen: list[tuple[int, int]] = []

    def listen(index, token):
        seen.append((index, token))
        return not (index == 1 and sum(i == 1 for i, _ in seen) == 3)

    found = generate_batch(engine, prompts, SamplingSettings(max_tokens=8, ignore_eos=True), listen)
    assert [one.finish_reason for one in found] == ["length", "interrupted"]
    assert len(found[1].tokens) == 3
    for index, one in enumerate(found):
        assert [token for i, token in seen if i == index] == one.tokens


def test_open_room_is_used_again(engine, random_generator):
    prompts = prompts_of(random_generator, 97, (4, 5, 6))
    room = engine.open_sequences(3)
    settings = SamplingSettings(max_tokens=5, ignore_eos=True)
    first = generate_batch(engine, prompts, settings, sequences=room)
    second = generate_batch(engine, prompts[:2], settings, sequences=room)
    assert [one.tokens for one in second] == [one.tokens for one in first[:2]]
    with pytest.raises(InputError):
        generate_batch(engine, [*prompts, prompts[0]], settings, sequences=room)
    assert [one.tokens for one in generate_batch(engine, prompts, settings, sequences=room)] == [
        one.tokens for one in first
    ]


def test_what_can_not_be_continued(engine, tiny_model):
    settings = SamplingSettings(max_tokens=3)
    with pytest.raises(InputError, match="no prompts"):
        generate_batch(engine, [], settings)
    with pytest.raises(InputError, match="no tokens"):
        generate_batch(engine, [[1], []], settings)
    with pytest.raises(InputError, match="fill the context of 40"):
        generate_batch(engine, [[1] * 40], settings)
    torch_engine = open_engine(tiny_model(), runtime="torch", options=EngineOptions(threads=1))
    with pytest.raises(InputError, match="one sequence at a time"):
        generate_batch(torch_engine, [[1]], settings)
