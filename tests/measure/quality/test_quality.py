"""Quality figures against scipy, by hand, and on the shipped model."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import log_softmax

from trilemma.core.errors import DataError, EngineError, OutputError
from trilemma.data.documents import Document, read_documents
from trilemma.data.windows import make_windows
from trilemma.measure.quality.figures import Reference, evaluate, perplexity_of, token_documents
from trilemma.measure.quality.reference_store import bound_token_set
from trilemma.measure.quality.token_scores import kl_divergence, log_normalizer, pack_log_probs


def table_logits(rng, vocab, spread=3.0):
    table = (spread * rng.standard_normal((vocab, vocab))).astype(np.float32)
    return lambda tokens: table[tokens]


def oracle(token_set, reference, candidate):
    """Every figure in float64 by scipy: (nll, reference nll, kl, agrees)."""
    rows = []
    for window in token_set.windows:
        p = log_softmax(reference(window)[:-1].astype(np.float64), axis=1)
        q = log_softmax(candidate(window)[:-1].astype(np.float64), axis=1)
        at = np.arange(len(window) - 1)
        rows.append(
            np.stack([-q[at, window[1:]], -p[at, window[1:]], (np.exp(p) * (p - q)).sum(1), p.argmax(1) == q.argmax(1)])
        )
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize(("vocab", "spread"), [(11, 3.0), (257, 1.0), (1000, 8.0)])
def test_figures_agree_with_scipy(fake_engine, make_token_set, random_generator, tmp_path, vocab, spread):
    tokens = make_token_set(random_generator, documents=9, windows=4, context=17, vocab=vocab)
    truth = table_logits(random_generator, vocab, spread)
    noise = (0.3 * random_generator.standard_normal((vocab, vocab))).astype(np.float32)
    changed = lambda ids: truth(ids) + noise[ids]  # noqa: E731
    reference = Reference.build(fake_engine(truth, vocab=vocab), tokens, tmp_path)
    found = evaluate(fake_engine(changed, vocab=vocab), reference, tokens)
    nll, base_nll, kl, agrees = oracle(tokens, truth, changed)
    assert found["perplexity"].value == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    assert found["ppl_increase"].value == pytest.approx(math.exp((nll - base_nll).mean()) - 1, rel=1e-4, abs=1e-6)
    assert found["kl_mean"].value == pytest.approx(kl.mean(), rel=1e-3)
    assert found["kl_p99"].value == pytest.approx(np.quantile(kl, 0.99, method="inverted_cdf"), rel=1e-3)
    assert found["top1_agreement"].value == pytest.approx(agrees.mean())
    bits = nll.sum() / math.log(2) / tokens.text_bytes.sum()
    assert found["bits_per_byte"].value == pytest.approx(bits, rel=1e-6)
    for name in ("perplexity", "bits_per_byte", "ppl_increase", "kl_mean", "top1_agreement"):
        low, high = found[name].ci95
        assert low <= found[name].value <= high, name
        assert found[name].n == 9
        assert found[name].conditions["context"] == 17


def test_a_case_by_hand(fake_engine, tmp_path):
    """Two words; the reference says 3:1, the candidate 1:1; the text is 'a a b' and 'a b'."""
    tokens = make_windows([Document("aab", "d", "1"), Document("ab", "d", "2")], lambda s: [ord(c) - 97 for c in s], 8,
                          decode=lambda ids: "".join(chr(97 + i) for i in ids))  # fmt: skip
    reference = Reference.build(fake_engine(lambda t: [[math.log(3), 0.0]] * len(t), vocab=2), tokens, tmp_path)
    found = evaluate(fake_engine(lambda t: [[5.0, 5.0]] * len(t), vocab=2), reference)
    assert found["perplexity"].value == pytest.approx(2.0)
    assert found["bits_per_byte"].value == pytest.approx(1.0)
    base = math.exp(-(math.log(0.75) + 2 * math.log(0.25)) / 3)
    assert found["ppl_increase"].value == pytest.approx(2 / base - 1, rel=1e-6)
    assert found["ppl_increase"].conditions["reference_perplexity"] == pytest.approx(base)
    assert found["kl_mean"].value == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-4)


def test_the_same_model_differs_by_nothing(fake_engine, make_token_set, random_generator, tmp_path):
    tokens = make_token_set(random_generator, vocab=300)
    truth = table_logits(random_generator, 300, 10.0)
    reference = Reference.build(fake_engine(truth, vocab=300), tokens, tmp_path)
    found = evaluate(fake_engine(truth, vocab=300), reference)
    assert abs(found["kl_mean"].value) < 1e-6
    assert found["ppl_increase"].value == 0
    assert found["top1_agreement"].value == 1
    assert found["top1_agreement"].ci95[0] < 1


def test_logits_far_apart_and_shifted_change_nothing(random_generator):
    logits = (20 * random_generator.standard_normal((70, 513))).astype(np.float32)
    normalizer = log_normalizer(logits)
    assert np.allclose(normalizer, np.logaddexp.reduce(logits.astype(np.float64), axis=1), atol=1e-5)
    packed = pack_log_probs(logits, normalizer)
    shifted = logits + np.float32(64.0)
    assert np.abs(kl_divergence(packed, shifted, log_normalizer(shifted))).max() < 2e-5


def test_a_collapsed_model_does_not_pass(fake_engine, make_token_set, random_generator, tmp_path):
    tokens = make_token_set(random_generator)
    truth = table_logits(random_generator, 11)
    reference = Reference.build(fake_engine(truth), tokens, tmp_path)
    for bad in (np.nan, np.inf, -np.inf):

        def broken(ids, bad=bad):
            logits = truth(ids).copy()
            logits[0, 3] = bad
            return logits

        with pytest.raises(EngineError, match=r"not finite|infinite"):
            evaluate(fake_engine(broken), reference)
    nothing = lambda ids: np.full((len(ids), 11), np.nan)  # noqa: E731
    with pytest.raises(EngineError, match=r"window 0, position 0"):
        perplexity_of(fake_engine(nothing), tokens)
    with pytest.raises(EngineError, match="not finite"):
        Reference.build(fake_engine(nothing), tokens, tmp_path / "other")


def test_mismatches_are_refused(fake_engine, make_token_set, random_generator, tmp_path):
    tokens, other = make_token_set(random_generator), make_token_set(random_generator)
    reference = Reference.build(fake_engine(table_logits(random_generator, 11)), tokens, tmp_path)
    with pytest.raises(DataError, match="other tokens"):
        evaluate(fake_engine(table_logits(random_generator, 11)), reference, other)
    with pytest.raises(EngineError, match="same vocabulary"):
        evaluate(fake_engine(table_logits(random_generator, 12), vocab=12), reference)
    with pytest.raises(EngineError, match="does not fit"):
        perplexity_of(fake_engine(table_logits(random_generator, 11), context=1), tokens)


def test_the_reference_is_cached_by_key_and_bounded(fake_engine, make_token_set, random_generator, tmp_path):
    tokens = make_token_set(random_generator, documents=10, windows=5)
    truth = table_logits(random_generator, 11)
    first = Reference.build(fake_engine(truth), tokens, tmp_path, key="abc")
    again = Reference.build(fake_engine(None), tokens, tmp_path, key="abc")  # would fail if it ran
    assert np.array_equal(first.codes, again.codes)
    assert np.array_equal(first.nll, again.nll)

    room = 2 * 11 * 100
    small = Reference.build(fake_engine(truth), tokens, tmp_path, max_bytes=room)
    assert small.codes.nbytes <= room
    assert small.token_set.document_count == 10
    assert "tokens: the reference of all" in small.notes[0]
    assert evaluate(fake_engine(truth), small, tokens)["kl_mean"].conditions["tokens"] <= 100
    with pytest.raises(DataError, match="5 are needed"):
        bound_token_set(tokens, 11, 2 * 11 * 4)


def test_an_unwritable_cache_says_so(fake_engine, make_token_set, random_generator, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OutputError, match="can not be written"):
        Reference.build(fake_engine(table_logits(random_generator, 11)), make_token_set(random_generator), blocked)


def test_documents_of_tokens(make_token_set, random_generator):
    tokens = make_token_set(random_generator)
    owners = token_documents(tokens)
    assert len(owners) == tokens.predicted_tokens
    assert np.all(np.diff(owners) >= 0)


@pytest.mark.shared
def test_the_shipped_model_has_its_published_perplexity(shared_dir, hearth_path):
    """44.91, 1.471 bits a byte: transformers, f32, first 60 windows of 512, no BOS, prepared text."""
    from trilemma.formats.artifact import load_any
    from trilemma.model.tokenizer import Tokenizer
    from trilemma.runtime import EngineOptions, open_engine

    tokenizer = Tokenizer.load(hearth_path)
    texts = read_documents(shared_dir / "data/text/books-kids-valid.txt", prepare="book", cut=False)
    tokens = make_windows(texts[:1], tokenizer.encode_plain, 512, 60 * 512, decode=tokenizer.decode, spread=False)
    engine = open_engine(load_any(hearth_path), options=EngineOptions(kv_cache="f32"))
    found = perplexity_of(engine, tokens)
    engine.close()
    assert len(tokens.windows) == 60
    assert found["perplexity"].value == pytest.approx(44.91, abs=0.01)
    assert found["bits_per_byte"].value == pytest.approx(1.471, abs=0.001)
