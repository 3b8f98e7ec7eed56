"""Pages of the cache: whatever is forked, truncated, shared, released, saved and restored, every sequence gives the
logits that its tokens give in a fresh engine, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trilemma.core.errors import InputError
from trilemma.formats.artifact import load_any
from trilemma.runtime.batch import generate_batch
from trilemma.runtime.engine import EngineOptions, SamplingSettings
from trilemma.runtime.memory_forecast import forecast_engine
from trilemma.runtime.native import CachePages, NativeEngine, Step

CONTEXT, SEQUENCES, VOCAB = 400, 4, 97
PAGE = 128


def open_tiny(tiny_model, **options):
    return NativeEngine(tiny_model(seed=3, context=CONTEXT), EngineOptions(threads=1, **options))


class Model:
    """What the sequences hold, as lists of tokens, beside the room that is tested."""

    def __init__(self, engine, room):
        self.engine, self.room = engine, room
        self.held: dict[int, list[int]] = {}

    def begin(self, tokens):
        if len(self.held) == SEQUENCES:
            with pytest.raises(InputError, match="sequences of this context are in use"):
                self.room.begin(tokens)
            return
        sequence, reused = self.room.begin(tokens)
        assert sequence not in self.held
        assert 0 <= reused < len(tokens)
        self.held[sequence] = list(tokens[:reused])
        assert self.room.length(sequence) == reused
        self.append({sequence: tokens[reused:]})

    def append(self, parts):
        parts = {s: tokens[: CONTEXT - len(self.held[s])] for s, tokens in parts.items()}
        steps = [Step(s, tokens, "all") for s, tokens in parts.items() if len(tokens)]
        before = {s: list(tokens) for s, tokens in self.held.items()}
        try:
            rows = self.room.forward(steps)
        except InputError as error:
            if "pages of the cache are in use" not in str(error):
                raise
            assert sum(-(-len(t) // PAGE) for t in before.values()) + len(steps) * 3 > self.room.pages().total
            rows = []
            steps = []
        for step, found in zip(steps, rows, strict=True):
            self.held[step.sequence] += list(step.tokens)
            wanted = self.engine.logits(self.held[step.sequence])[-len(step.tokens) :]
            np.testing.assert_array_equal(found, wanted)
        self.check()

    def fork(self, sequence):
        if len(self.held) == SEQUENCES:
            return
        before = self.room.pages().held
        copy = self.room.fork(sequence)
        assert self.room.pages().held == before  # nothing is copied before it is written on
        self.held[copy] = list(self.held[sequence])

    def truncate(self, sequence, share):
        length = int(share * len(self.held[sequence]))
        self.room.truncate(sequence, length)
        self.held[sequence] = self.held[sequence][:length]

    def release(self, sequence):
        self.room.release(sequence)
        del self.held[sequence]

    def save_and_restore(self, sequence):
        saved = self.room.save(sequence)
        tokens = self.held[sequence]
        self.release(sequence)
        try:
            again = self.room.restore(saved)
        except InputError as error:  # its pages may have been shared, and there are not enough
            if "free pages" not in str(error):
                raise
            return
        self.held[again] = tokens

    def check(self):
        pages = self.room.pages()
        assert pages.held + pages.kept <= pages.total
        assert pages.held <= sum(-(-len(tokens) // PAGE) for tokens in self.held.values())
        for sequence, tokens in self.held.items():
            assert self.room.length(sequence) == len(tokens)


def some_tokens(draw, model):
    """New ones, or ones that begin as a sequence does."""
    count = draw(st.integers(1, 300))
    tokens = np.random.default_rng(draw(st.integers(0, 5))).integers(0, VOCAB, count).tolist()
    if model.held and draw(st.booleans()):
        other = model.held[draw(st.sampled_from(sorted(model.held)))]
        tokens = (other[: draw(st.integers(0, len(other)))] + tokens)[:CONTEXT]
    return tokens


@pytest.mark.parametrize(("kv", "share", "budget"), [
    ("bf16", True, None), ("int8", True, 640), ("f32", False, 384), ("int4", True, 640),
    ("none", True, None), ("f32", True, 256),
])  # fmt: skip
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_order_of_operations(tiny_model, kv, share, budget, data):
    engine = open_tiny(tiny_model, kv_cache=kv)
    room = engine.open_sequences(SEQUENCES, kv_positions=budget, share_prefixes=share)
    model = Model(engine, room)
    for _ in range(data.draw(st.integers(5, 25))):
        if not model.held:
            model.begin(some_tokens(data.draw, model))
            continue
        sequence = data.draw(st.sampled_from(sorted(model.held)))
        action = data.draw(
            st.sampled_from(["begin", "append", "append", "batch", "fork", "truncate", "release", "save"])
        )
        if action == "begin":
            model.begin(some_tokens(data.draw, model))
        elif action == "append":
            model.append({sequence: some_tokens(data.draw, model)[: data.draw(st.integers(1, 140))]})
        elif action == "batch":
            model.append({s: some_tokens(data.draw, model)[: data.draw(st.integers(1, 9))] for s in model.held})
        elif action == "fork":
            model.fork(sequence)
        elif action == "truncate":
            model.truncate(sequence, data.draw(st.floats(0, 1)))
        elif action == "release":
            model.release(sequence)
        else:
            model.save_and_restore(sequence)
        model.check()
    for sequence in list(model.held):
        model.append({sequence: [1, 2, 3]})
        model.release(sequence)
    assert room.pages().held == 0
    assert share or room.pages().kept == 0
    engine.close()


def tokens_of(generator, count):
    return generator.integers(0, VOCAB, count).tolist()


def test_a_fork_copies_one_page_when_it_writes(tiny_model, random_generator):
    room = open_tiny(tiny_model).open_sequences(4)
    trunk = room.create()
    room.forward([Step(trunk, tokens_of(random_generator, 300))])
    assert room.pages() == CachePages(total=16, held=3, kept=0)
    first, second = room.fork(trunk), room.fork(trunk)
    room.forward([Step(first, [1]), Step(second, [2])])
    assert room.pages().held == 5
    room.release(trunk)  # its last page is nobody's now
    assert room.pages().held == 4
    room.truncate(first, 256)
    assert room.pages().held == 3
    room.release(first)
    room.release(second)
    assert room.pages() == CachePages(total=16, held=0, kept=0)


def test_a_new_sequence_begins_with_what_is_there(tiny_model, random_generator):
    engine = open_tiny(tiny_model)
    room = engine.open_sequences(3, share_prefixes=True)
    text = tokens_of(random_generator, 300)
    live, reused = room.begin(text)
    assert reused == 0
    room.forward([Step(live, text)])
    same, reused = room.begin(text)
    assert reused == 299  # the last token gives the logits
    np.testing.assert_array_equal(room.forward([Step(same, text[299:])])[0], engine.logits(text)[-1:])
    other = [*text[:200], (text[200] + 1) % VOCAB, *text[201:]]
    branch, reused = room.begin(other)
    assert reused == 200
    np.testing.assert_array_equal(room.forward([Step(branch, other[200:])])[0], engine.logits(other)[-1:])
    for sequence in (live, same, branch):
        room.release(sequence)
    assert room.pages().held == 0
    assert room.begin(text)[1] == 299  # released long ago, still there
    assert room.begin(text[:7])[1] == 0  # too little to be worth a copy
    assert engine.open_sequences(1).begin(text)[1] == 0


def test_equal_pages_are_held_once_however_they_came(tiny_model, random_generator):
    room = open_tiny(tiny_model).open_sequences(4, share_prefixes=True)
    text = tokens_of(random_generator, 256)
    sequences = [room.create() for _ in range(4)]
    room.forward([Step(sequence, [*text, number]) for number, sequence in enumerate(sequences)])
    assert room.pages().held == 2 + 4


def test_a_page_that_others_go_on_from_is_not_written_over(tiny_model, random_generator):
    engine = open_tiny(tiny_model)
    room = engine.open_sequences(2, share_prefixes=True)
    first, last, other = (tokens_of(random_generator, PAGE) for _ in range(3))
    before, _ = room.begin([*first, *last, 1])
    room.forward([Step(before, [*first, *last, 1])])
    room.release(before)
    sequence, reused = room.begin([*first, 1])
    assert reused == PAGE
    room.truncate(sequence, 100)
    changed = [*first[:100], *other[:28], *last]
    found = room.forward([Step(sequence, changed[100:], "none"), Step(room.create(), [1])])[1]
    np.testing.assert_array_equal(found, engine.logits([1]))
    changed.append(2)
    np.testing.assert_array_equal(room.forward([Step(sequence, [2])])[0], engine.logits(changed)[-1:])


def test_memory_is_taken_from_the_prefix_unused_for_longest(tiny_model, random_generator):
    room = open_tiny(tiny_model).open_sequences(2, kv_positions=4 * PAGE, share_prefixes=True)
    first, second, third = (tokens_of(random_generator, 200) for _ in range(3))
    for text in (first, second):
        sequence, _ = room.begin(text)
        room.forward([Step(sequence, text)])
        room.release(sequence)
    room.release(room.begin(first)[0])  # used again: now the second is the older one
    sequence, _ = room.begin(third)
    room.forward([Step(sequence, third)])
    assert room.begin(first)[1] == 199
    room.release(sequence)
    assert room.begin(second)[1] == 0


def test_a_step_beyond_the_budget_changes_nothing(tiny_model, random_generator):
    room = open_tiny(tiny_model).open_sequences(3, kv_positions=3 * PAGE)
    one, other = room.create(), room.create()
    room.forward([Step(one, tokens_of(random_generator, 100)), Step(other, tokens_of(random_generator, 100))])
    with pytest.raises(InputError, match="All 3 pages of the cache are in use, of 128 positions each"):
        room.forward([Step(one, tokens_of(random_generator, 100)), Step(other, tokens_of(random_generator, 100))])
    assert (room.length(one), room.length(other), room.pages().held) == (100, 100, 2)
    room.forward([Step(one, tokens_of(random_generator, 100))])
    with pytest.raises(InputError, match="kv_positions=0"):
        open_tiny(tiny_model).open_sequences(3, kv_positions=0)


@pytest.mark.parametrize(("sequences", "budget"), [(3, 300), (8, 128), (2, 10_000), (5, 1)])
def test_the_forecast_knows_the_budget(tiny_model, sequences, budget):
    engine = open_tiny(tiny_model)
    found = forecast_engine(
        engine_model := tiny_model(seed=3, context=CONTEXT),
        context=CONTEXT,
        sequences=sequences,
        kv_positions=budget,
        kv=engine.kv_cache,
    )
    real = engine.open_sequences(sequences, kv_positions=budget).memory()
    assert (found.kv_bytes, found.scratch_bytes) == (real.kv_bytes, real.scratch_bytes)
    whole = forecast_engine(engine_model, context=CONTEXT, sequences=sequences, kv=engine.kv_cache)
    assert found.kv_bytes == min(-(-budget // PAGE), 4 * sequences) * whole.kv_bytes // (4 * sequences)


def test_saved_sequences_are_checked(tiny_model, random_generator):
    engine = open_tiny(tiny_model)
    room = engine.open_sequences(2)
    text = tokens_of(random_generator, 150)
    sequence = room.create()
    room.forward([Step(sequence, text)])
    saved = room.save(sequence)
    elsewhere = open_tiny(tiny_model).open_sequences(1, share_prefixes=True)
    again = elsewhere.restore(saved)
    np.testing.assert_array_equal(elsewhere.forward([Step(again, [5])])[0], engine.logits([*text, 5])[-1:])
    elsewhere.release(again)
    assert elsewhere.begin(text)[1] == 0  # what came from outside is not given to others
    for at in random_generator.integers(0, len(saved), 40):
        bad = bytearray(saved)
        bad[at] ^= 1 + int(random_generator.integers(0, 255))
        with pytest.raises(InputError, match="can not be restored"):
            room.restore(bytes(bad))
    for cut in (0, 10, 47, len(saved) - 1):
        with pytest.raises(InputError, match="can not be restored"):
            room.restore(saved[:cut])
    others = {
        "other weights": NativeEngine(tiny_model(seed=4, context=CONTEXT), EngineOptions(threads=1)).open_sequences(1),
        "its cache is": open_tiny(tiny_model, kv_cache="f32").open_sequences(1),
        "it holds 150 positions; this context holds 130": engine.open_sequences(1, max_context=130),
        "laid out otherwise": engine.open_sequences(1, max_context=64),
        "are not 2 free pages": engine.open_sequences(1, kv_positions=128),
    }
    for why, other in others.items():
        with pytest.raises(InputError, match=why):
            other.restore(saved)
        assert other.create() == 0  # no sequence was lost


def test_prompts_of_a_batch_that_begin_alike_are_computed_once(tiny_model, random_generator):
    engine = open_tiny(tiny_model)
    common, firsts = tokens_of(random_generator, 180), random_generator.permutation(VOCAB)
    prompts = [
        [*common, int(first), *tokens_of(random_generator, n)] for first, n in zip(firsts, (2, 8, 39), strict=False)
    ]
    prompts += [[(common[0] + 1) % VOCAB, *tokens_of(random_generator, 19)], common]
    wanted = SamplingSettings(max_tokens=6, temperature=0.9, seed=5, ignore_eos=True)
    found = generate_batch(engine, prompts, wanted)
    assert [one.tokens for one in found] == [engine.generate(prompt, wanted).tokens for prompt in prompts]
    assert [one.reused_tokens for one in found] == [0, 180, 180, 0, 179]
    assert [
        one.reused_tokens for one in generate_batch(engine, prompts, wanted, sequences=engine.open_sequences(5))
    ] == [0] * 5
    alone = open_tiny(tiny_model, share_prefixes=False)
    assert [one.reused_tokens for one in generate_batch(alone, prompts, wanted)] == [0] * 5


def test_drafts_of_several_sequences_are_verified_beside_a_prefill_and_plain_steps(hearth_path, random_generator):
    """One call: k + 1 tokens of three sequences with all logits, a token of two more, a long prompt that begins."""
    engine = NativeEngine(load_any(hearth_path), EngineOptions(threads=2))
    room, apart = engine.open_sequences(6), engine.open_sequences(6)
    lengths = [*random_generator.integers(1, 300, 5).tolist(), 0]
    counts = [*random_generator.integers(2, 9, 3).tolist(), 1, 1, 170]
    kinds = ["all", "all", "all", "last", "last", "last"]
    steps = []
    for length, count, kind in zip(lengths, counts, kinds, strict=True):
        tokens = random_generator.integers(0, engine.config.vocab_size, length).tolist()
        for place in (room, apart):
            sequence = place.create()
            if tokens:
                place.forward([Step(sequence, tokens, "none")])
        steps.append(Step(sequence, random_generator.integers(0, engine.config.vocab_size, count), kind))
    order = random_generator.permutation(len(steps))
    together = room.forward([steps[at] for at in order])
    for found, at in zip(together, order, strict=True):
        step = steps[at]
        one_by_one = [apart.forward([Step(step.sequence, [token])])[0] for token in step.tokens]
        wanted = np.concatenate(one_by_one) if step.logits == "all" else one_by_one[-1]
        np.testing.assert_array_equal(found, wanted)
    for step in steps[:3]:  # a draft that is refused, and another one
        for place in (room, apart):
            place.truncate(step.sequence, place.length(step.sequence) - len(step.tokens) + 1)
    again = [Step(step.sequence, [5, 6], "all") for step in steps[:3]]
    for found, step in zip(room.forward(again), again, strict=True):
        np.testing.assert_array_equal(found, apart.forward([step])[0])
    engine.close()


def test_requests_one_after_another_share_their_beginning(tiny_model, random_generator):
    plain, sharing = open_tiny(tiny_model), open_tiny(tiny_model, share_prefixes=True)
    text = tokens_of(random_generator, 250)
    wanted = SamplingSettings(max_tokens=9, temperature=1.0, repetition_penalty=1.3, seed=2, ignore_eos=True)
    for count, reused in ((200, 0), (250, 200), (30, 29)):
        one, other = plain.generate(text[:count], wanted), sharing.generate(text[:count], wanted)
        assert one.tokens == other.tokens
        assert (one.reused_tokens, other.reused_tokens) == (0, reused)
    np.testing.assert_array_equal(sharing.logits(text, last_only=True), plain.logits(text, last_only=True))
    np.testing.assert_array_equal(sharing.logits(text), plain.logits(text))
