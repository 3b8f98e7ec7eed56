"""Speculation changes nothing but the speed: any draft, any setting, any end; and it stops where it loses."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import InputError
from trilemma.formats import FORMATS
from trilemma.formats.quantize import quantize_rtn
from trilemma.model.model import LinearRun
from trilemma.runtime.draft_length import DraftLength, expected_speedup, expected_tokens
from trilemma.runtime.drafts import LookupDraft
from trilemma.runtime.engine import EngineOptions, SamplingSettings
from trilemma.runtime.native import NativeEngine
from trilemma.runtime.speculative import SpeculativeEngine, model_draft, open_speculative, speculate

ONE = EngineOptions(threads=1)
SHAPE = {"dim": 60, "heads": 6, "kv_heads": 2, "head_dim": 8, "ffn": 172, "vocab": 511, "context": 96}


def int4(model):
    spec = FORMATS.get("int4-g32")
    names = [name for name, shape in model.config.tensor_shapes().items() if len(shape) == 2]
    tensors = {name: quantize_rtn(model.tensor(name), spec) for name in names}
    return model.with_tensors(tensors, {name: LinearRun(activation="int8-g32") for name in names})


class Oracle:
    """Knows the answer, and errs on purpose every `wrong_every` tokens."""

    name = "oracle"

    def __init__(self, text, wrong_every=0):
        self.text, self.wrong_every = list(text), wrong_every

    def begin(self): ...

    def propose(self, seen, count, settings):
        found = self.text[len(seen) : len(seen) + count]
        every = self.wrong_every
        return [
            (token + 1) % 511 if every and (len(seen) + at) % every == 0 else token for at, token in enumerate(found)
        ]

    def close(self): ...


@pytest.fixture(scope="module")
def tiny(tiny_model):
    """A target, its 4-bit twin and a stranger."""
    target = tiny_model(seed=5, **SHAPE)
    stranger = tiny_model(seed=6, **{**SHAPE, "dim": 36, "heads": 4})
    return [NativeEngine(model, ONE) for model in (target, int4(target), stranger)]


@pytest.mark.parametrize("draft_tokens", [None, 1, 3, 7])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_any_draft_gives_the_tokens_of_plain_decoding(tiny, random_generator, draft_tokens, temperature):
    target, *drafts = tiny
    for _ in range(3):
        prompt = random_generator.integers(0, 511, int(random_generator.integers(1, 40))).tolist()
        settings = SamplingSettings(
            max_tokens=50, temperature=temperature, seed=int(random_generator.integers(1000)), top_k=40, top_p=0.95,
            repetition_penalty=float(random_generator.choice([1.0, 1.2])),
        )  # fmt: skip
        plain = target.generate(prompt, settings)
        for draft in [*drafts, LookupDraft(), None, Oracle(prompt + plain.tokens, 5)]:
            found = speculate(target, draft, prompt, settings, draft_tokens=draft_tokens)
            assert found.tokens == plain.tokens
            assert found.finish_reason == plain.finish_reason
            assert len(found.token_times_s) == len(found.tokens)


@pytest.mark.parametrize("kv", ["none", "f32", "bf16", "int8", "int4"])
def test_every_kv_policy_and_the_end_of_the_context(tiny_model, random_generator, kv):
    model = tiny_model(seed=5, **SHAPE)
    target = NativeEngine(model, EngineOptions(threads=1, kv_cache=kv))
    short = NativeEngine(model, EngineOptions(threads=1, kv_cache=kv, max_context=80))
    prompt = random_generator.integers(0, 511, 70).tolist()
    plain = target.generate(prompt, SamplingSettings(max_tokens=500))
    assert plain.finish_reason == "context"
    assert len(prompt) + len(plain.tokens) == 96
    for draft in (target, short):  # the shorter draft falls silent on the way
        found = speculate(target, draft, prompt, SamplingSettings(max_tokens=500), draft_tokens=4)
        assert (found.tokens, found.finish_reason) == (plain.tokens, "context")
        assert found.figures.accepted > 0


def test_a_draft_that_is_always_right_fills_every_pass(tiny):
    target = tiny[0]
    settings = SamplingSettings(max_tokens=41)
    plain = target.generate([1, 2, 3], settings)
    found = speculate(target, Oracle([1, 2, 3, *plain.tokens]), [1, 2, 3], settings, draft_tokens=4)
    assert found.tokens == plain.tokens
    figures = found.figures
    assert figures.passes == 8  # one token from the prompt, then 5 a pass
    assert figures.tokens_per_pass == 5
    assert figures.acceptance_rate == 1
    wrong = speculate(target, Oracle([1, 2, 3, *plain.tokens], 1), [1, 2, 3], settings, draft_tokens=4)
    assert wrong.tokens == plain.tokens
    assert wrong.figures.accepted == 0
    assert wrong.figures.passes == 40


def test_a_stop_token_inside_an_accepted_run_ends_there(tiny):
    target = tiny[0]
    plain = target.generate([9, 8], SamplingSettings(max_tokens=30))
    text = [9, 8, *plain.tokens]
    for place in range(1, 12):
        stop = plain.tokens[place]
        settings = SamplingSettings(max_tokens=30, stop_token_ids=(stop,))
        expected = target.generate([9, 8], settings)
        found = speculate(target, Oracle(text), [9, 8], settings, draft_tokens=6)
        assert (found.tokens, found.finish_reason) == (expected.tokens, "stop")
    seen: list[int] = []

    def until_five(token):
        seen.append(token)
        return len(seen) < 5

    found = speculate(
        target, Oracle(text), [9, 8], SamplingSettings(max_tokens=30), draft_tokens=6, on_token=until_five
    )
    assert found.finish_reason == "interrupted"
    assert found.tokens == seen == plain.tokens[:5]


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 6])
def test_never_more_than_was_asked_for(tiny, max_tokens):
    settings = SamplingSettings(max_tokens=max_tokens)
    found = speculate(tiny[0], tiny[0], [4, 5, 6], settings, draft_tokens=15)
    assert (len(found.tokens), found.finish_reason) == (max_tokens, "length")
    assert found.figures.drafted <= max_tokens  # nothing is drafted that could not be used


def test_the_shipped_model_with_its_4_bit_twin_and_with_its_own_words(hearth_path):
    from trilemma.formats.artifact import load_any

    model = load_any(hearth_path)
    target, twin = NativeEngine(model, ONE), NativeEngine(int4(model), ONE)
    prompt = [0, 6682, 620, 297, 1046]
    for settings in (SamplingSettings(max_tokens=90), SamplingSettings(max_tokens=60, temperature=0.8, seed=4)):
        plain = target.generate(prompt, settings)
        found = speculate(target, twin, prompt, settings, draft_tokens=4)
        assert found.tokens == plain.tokens
        assert speculate(target, None, prompt, settings).tokens == plain.tokens
    # greedy 4-bit twins agree nearly always; draws with shared numbers less often, and one draw may be unlucky
    assert (
        speculate(target, twin, prompt, SamplingSettings(max_tokens=90), draft_tokens=4).figures.acceptance_rate > 0.8
    )
    draws = [SamplingSettings(max_tokens=60, temperature=0.8, seed=seed) for seed in range(4, 10)]
    figures = [speculate(target, twin, prompt, one, draft_tokens=4).figures for one in draws]
    accepted, refused = sum(f.accepted for f in figures), sum(f.refused for f in figures)
    assert accepted > 0.3 * (accepted + refused)


@pytest.mark.shared
def test_stories_with_its_4_bit_twin(shared_dir):
    from trilemma.formats.artifact import load_any

    model = load_any(shared_dir / "models" / "stories260K")
    with open_speculative(model.path, options=ONE) as looked_up:
        plain = looked_up.engine.target.generate([1, 403, 407], SamplingSettings(max_tokens=200))
        found = looked_up.engine.generate([1, 403, 407], SamplingSettings(max_tokens=200))
        assert (found.tokens, found.finish_reason) == (plain.tokens, plain.finish_reason)
        twin = speculate(looked_up.engine.target, NativeEngine(int4(model), ONE), [1, 403, 407],
                         SamplingSettings(max_tokens=200))  # fmt: skip
        assert twin.tokens == plain.tokens


def test_lookup_copies_what_followed_last_time():
    draft = LookupDraft(longest=3, shortest=2)
    greedy = SamplingSettings()
    assert draft.propose([1, 2, 3, 4, 5], 4, greedy) == []
    assert draft.propose([1, 2, 3, 4, 5, 2, 3], 3, greedy) == [4, 5, 2]
    draft.begin()
    assert draft.propose([1, 2, 9, 1, 2, 8, 7, 1, 2], 2, greedy) == [8, 7]  # the latest occurrence
    draft.begin()
    assert draft.propose([6, 7, 6, 7, 6, 7], 5, greedy) == [6, 7, 6, 7, 6]  # a loop goes on
    draft.begin()
    assert draft.propose([5], 3, greedy) == []
    # asked step by step it knows the same as at once
    text = np.random.default_rng(1).integers(0, 4, 60).tolist()
    for end in range(1, 61):
        fresh = LookupDraft(longest=3, shortest=2)
        assert draft.propose(text[:end], 4, greedy) == fresh.propose(text[:end], 4, greedy) or end < 2


def test_the_expected_gain_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    for rate, drafted in ((0.0, 3), (0.5, 1), (0.8, 5)):
        runs = [np.append(rng.random(drafted) < rate, False).argmin() + 1 for _ in range(40_000)]
        assert expected_tokens(rate, drafted) == pytest.approx(np.mean(runs), rel=0.02)
    assert expected_tokens(1.0, 4) == 5
    assert expected_speedup(0.8, 5, 0.05) == pytest.approx((1 - 0.8**6) / 0.2 / 1.25)
    assert expected_speedup(0.8, 5, 0.05, 2.0) < expected_speedup(0.8, 5, 0.05)


def drive(length: DraftLength, *, rate: float, draft_s: float, wide_s: float, passes: int = 400) -> list[int]:
    """Feeds a made-up machine: plain pass 1 s, `wide_s` more for each further token."""
    rng = np.random.default_rng(3)
    chosen = []
    for _ in range(passes):
        drafted = length.choose(100)
        hits = rng.random(drafted) < rate
        length.saw(drafted, int(np.append(hits, False).argmin()), drafted * draft_s, 1 + drafted * wide_s)
        chosen.append(drafted)
    return chosen


def test_the_draft_length_follows_what_is_measured():
    cheap = drive(DraftLength(), rate=0.95, draft_s=0.02, wide_s=0.0)
    assert np.median(cheap) >= 8
    middling = drive(DraftLength(), rate=0.6, draft_s=0.1, wide_s=0.05)
    best = max(range(16), key=lambda g: expected_speedup(0.6, g, 0.1, 1 + 0.05 * g))
    assert abs(np.median(middling) - best) <= 1
    dear = drive(DraftLength(), rate=0.95, draft_s=0.9, wide_s=0.6)
    assert np.count_nonzero(dear) <= 6  # off, and seldom tried again
    useless = drive(DraftLength(), rate=0.0, draft_s=0.1, wide_s=0.1)
    assert np.count_nonzero(useless) <= 20
    assert set(drive(DraftLength(fixed=3), rate=0.0, draft_s=1, wide_s=1)) == {3}


def test_it_begins_again_when_text_becomes_easy():
    length = DraftLength()
    drive(length, rate=0.0, draft_s=0.1, wide_s=0.0, passes=100)
    assert np.mean(drive(length, rate=0.95, draft_s=0.1, wide_s=0.0, passes=600)[-200:]) > 2


def test_what_can_not_be_used_is_refused(tiny, tiny_model):
    with pytest.raises(InputError, match="token ids"):
        model_draft(tiny[0], NativeEngine(tiny_model(vocab=97), ONE))
    with pytest.raises(InputError, match="draft_tokens is 0"):
        SpeculativeEngine(tiny[0], LookupDraft(), 0)
    with pytest.raises(InputError, match="no tokens"):
        speculate(tiny[0], None, [])
    with pytest.raises(InputError, match="shorten"):
        speculate(tiny[0], None, [1] * 96)
    with pytest.raises(InputError, match="outside the vocabulary"):
        speculate(tiny[0], None, [600])
    with pytest.raises(InputError, match="temperature"):
        speculate(tiny[0], None, [1], SamplingSettings(temperature=-1))
    with pytest.raises(InputError, match="N-grams"):
        LookupDraft(1, 2)
