"""Every paired figure of real engines against a brute-force computation in float64 from torch's logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trilemma.core.errors import DataError
from trilemma.data.documents import Document
from trilemma.data.llama_cpp_windows import llama_cpp_windows
from trilemma.data.windows import TokenSet, make_windows
from trilemma.measure.quality.figures import evaluate, perplexity_of
from trilemma.measure.quality.reference_store import Reference, bound_token_set
from trilemma.runtime import open_engine
from trilemma.runtime.engine import EngineOptions

torch.set_num_threads(1)

OPTIONS = EngineOptions(threads=1, kv_cache="f32")


def token_sets(rng) -> dict[str, TokenSet]:
    """Odd lengths in every protocol; tokens of a vocabulary of 97 as characters."""
    texts = ["".join(chr(int(code)) for code in rng.integers(0, 97, size)) for size in (5, 61, 23, 130, 2, 47, 88)]
    documents = [Document(text, "d", str(index)) for index, text in enumerate(texts)]

    def encode(text):
        return [ord(char) for char in text]

    def decode(ids):
        return "".join(map(chr, ids))

    return {
        "windows": make_windows(documents, encode, 23, decode=decode),
        "stride": make_windows(documents, encode, 23, stride=7, decode=decode),
        "llama.cpp": llama_cpp_windows("".join(texts), encode, 17, bos=[1], decode=decode),
    }


def by_torch(reference, candidate, tokens):
    """(nll, reference nll, kl, agrees) of the scored tokens, in order."""
    found = []
    for index, window in enumerate(tokens.windows):
        count = len(tokens.targets(index))
        p, q = (torch.log_softmax(torch.from_numpy(engine.logits(window)).double(), -1)[-count - 1 : -1]
                for engine in (reference, candidate))  # fmt: skip
        targets = torch.from_numpy(window[-count:].astype(np.int64))[:, None]
        kl = (p.exp() * (p - q)).sum(1)
        found.append(torch.stack([-q.gather(1, targets)[:, 0], -p.gather(1, targets)[:, 0], kl,
                                  (p.argmax(1) == q.argmax(1)).double()]))  # fmt: skip
    return torch.cat(found, 1).numpy()


@pytest.mark.parametrize("protocol", ["windows", "stride", "llama.cpp"])
def test_native_figures_are_those_of_torch(tiny_model, random_generator, tmp_path, protocol):
    tokens = token_sets(random_generator)[protocol]
    base = tiny_model(seed=1)
    noise = 0.1 * random_generator.standard_normal((97, 48)).astype(np.float32)
    changed = base.with_tensors({"embedding.weight": base.tensor("embedding.weight") + noise})
    engines = [open_engine(model, options=OPTIONS) for model in (base, changed)]
    reference = Reference.build(engines[0], tokens, tmp_path)
    found = evaluate(engines[1], reference, tokens)
    oracles = [open_engine(model, runtime="torch", options=OPTIONS) for model in (base, changed)]
    nll, base_nll, kl, agrees = by_torch(*oracles, tokens)
    assert len(nll) == tokens.predicted_tokens == found["kl_mean"].conditions["tokens"]
    assert found["perplexity"].value == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert found["ppl_increase"].value == pytest.approx(math.exp((nll - base_nll).mean()) - 1, abs=1e-5)
    assert found["kl_mean"].value == pytest.approx(kl.mean(), rel=1e-3)
    for name, q in (("kl_p99", 0.99), ("kl_p999", 0.999)):
        assert found[name].value == pytest.approx(np.quantile(kl, q, method="inverted_cdf"), rel=1e-3)
    assert found["top1_agreement"].value == pytest.approx(agrees.mean(), abs=1.01 / len(agrees))
    nats = nll.sum()
    assert found["bits_per_byte"].value == pytest.approx(nats / math.log(2) / tokens.text_bytes.sum(), rel=1e-5)
    assert found["byte_perplexity"].value == pytest.approx(math.exp(nats / tokens.text_bytes.sum()), rel=1e-5)
    assert found["perplexity"].conditions["protocol"] == tokens.protocol
    unit = "windows" if protocol == "llama.cpp" else "documents"
    assert found["perplexity"].method.endswith(f"over {unit}")
    for engine in engines:
        engine.close()


def test_word_perplexity_is_that_of_lm_eval_on_scored_text(fake_engine):
    """Every token costs ln 11; the words of the scored text are counted by hand."""
    texts = ["one two three four", "a b  c"]
    documents = [Document(text, "d", str(index)) for index, text in enumerate(texts)]
    tokens = make_windows(documents, lambda text: [ord(char) % 11 for char in text], 6, stride=2,
                          decode=None)  # fmt: skip
    found = perplexity_of(fake_engine(lambda ids: np.zeros((len(ids), 11))), tokens)
    scored = sum(len(text) - 1 for text in texts)
    words = sum(count * (len(text) - 1) / len(text) for count, text in zip((4, 3), texts, strict=True))
    assert found["word_perplexity"].value == pytest.approx(math.exp(scored * math.log(11) / words))
    assert found["perplexity"].value == pytest.approx(11)


def test_a_document_without_a_whole_word_counts_with_its_neighbour(fake_engine):
    documents = [Document(text, "d", str(index)) for index, text in enumerate(["ab", "a b c", "ab", "a b d e"])]
    tokens = make_windows(documents, lambda text: [ord(char) for char in text], 16,
                          decode=lambda ids: "".join(map(chr, ids)))  # fmt: skip
    assert tokens.text_words.tolist() == [0, 2, 0, 3]
    found = perplexity_of(fake_engine(lambda ids: np.zeros((len(ids), 128)), vocab=128), tokens)["word_perplexity"]
    assert found.value == pytest.approx(128 ** (12 / 5))
    assert found.ci95 is not None


def test_a_text_without_white_space_has_no_word_perplexity(fake_engine):
    documents = [Document("abc" * 40, "d", "1"), Document("cab" * 40, "d", "2")]
    tokens = make_windows(documents, lambda text: [ord(char) % 11 for char in text], 16,
                          decode=lambda ids: "".join(chr(97 + item) for item in ids))  # fmt: skip
    found = perplexity_of(fake_engine(lambda ids: np.zeros((len(ids), 11))), tokens)["word_perplexity"]
    assert found.value is None
    assert "white space" in found.reason


def test_a_reference_of_another_protocol_is_refused(tiny_model, random_generator, tmp_path):
    sets = token_sets(random_generator)
    engine = open_engine(tiny_model(seed=1), options=OPTIONS)
    reference = Reference.build(engine, sets["windows"], tmp_path)
    for other in ("stride", "llama.cpp"):
        with pytest.raises(DataError, match="other tokens"):
            evaluate(engine, reference, sets[other])
    engine.close()


def test_a_bounded_reference_counts_scored_tokens(random_generator):
    tokens = token_sets(random_generator)["stride"]
    kept, notes = bound_token_set(tokens, 97, 2 * 97 * 120)
    assert 60 < kept.predicted_tokens <= 120
    assert kept.leads.tolist() == [0 if window.tolist() in [first.tolist() for first in _firsts(tokens)] else 15
                                   for window in kept.windows]  # fmt: skip
    assert notes


def _firsts(tokens):
    return [tokens.windows[int(np.argmax(tokens.documents == document))] for document in range(tokens.document_count)]
