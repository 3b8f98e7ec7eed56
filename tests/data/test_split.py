"""Three disjoint parts: deterministic, by document, without shared text."""

from __future__ import annotations

import numpy as np
import pytest

from trilemma.core.errors import DataError
from trilemma.data.documents import Document
from trilemma.data.shingles import group_similar, shared_fraction, shingle_hashes
from trilemma.data.split import require_disjoint, split_documents


def words(rng, count):
    return " ".join("".join(chr(97 + c) for c in rng.integers(0, 26, 5)) for _ in range(count))


def documents(rng, count, domain="d", size=120):
    return [Document(words(rng, size), domain, f"{domain} {index}") for index in range(count)]


def plain_shingles(text, n=13):
    """An oracle: lower-case words in a set of tuples."""
    found, word = [], ""
    for char in text + " ":
        if char.isascii() and not char.isalnum():
            if word:
                found.append(word)
            word = ""
        else:
            word += char.lower() if char.isascii() else char
    width = min(n, len(found))
    return {tuple(found[at : at + width]) for at in range(len(found) - width + 1)} if found else set()


def test_shingles_agree_with_plain_sets(random_generator):
    texts = [words(random_generator, int(n)) for n in random_generator.integers(0, 200, 12)]
    texts += [texts[3][:200] + "; " + texts[5].upper(), "Ünï cödé, a b c d e f g h i j k l m n", "", "...", "one"]
    for left in texts:
        for right in texts:
            ours, plain = shingle_hashes(left), plain_shingles(left)
            assert len(ours) == len(plain)
            expected = len(plain & plain_shingles(right)) / len(plain) if plain else 0.0
            assert shared_fraction(ours, shingle_hashes(right)) == pytest.approx(expected)


def test_groups_are_transitive_and_exact(random_generator):
    base = words(random_generator, 100)
    texts = [base, words(random_generator, 100), base + " " + words(random_generator, 300)]
    groups = group_similar([shingle_hashes(text) for text in texts], 0.5)
    assert sorted(map(sorted, groups)) == [[0, 2], [1]]


def test_split_is_complete_disjoint_and_repeatable(random_generator):
    given = documents(random_generator, 60, "a") + documents(random_generator, 30, "b")
    first, again = split_documents(given, seed=5), split_documents(given, seed=5)
    assert first == again
    assert split_documents(given, seed=6).calibrate != first.calibrate
    sources = [item.source for part in first.named().values() for item in part]
    assert sorted(sources) == sorted(item.source for item in given)
    for domain, count in (("a", 60), ("b", 30)):
        held = [sum(item.domain == domain for item in part) for part in first.named().values()]
        assert held == pytest.approx([0.4 * count, 0.3 * count, 0.3 * count], abs=2)
    require_disjoint(first.named())


def test_near_duplicates_stay_together_and_copies_are_dropped(random_generator):
    given = documents(random_generator, 20)
    near = Document(given[4].text + " and something more", "d", "near")
    copy = Document("  " + given[7].text + "\n", "d", "copy")
    for seed in range(8):
        parts = split_documents([*given, near, copy], seed=seed)
        holding = [{item.source for item in part} for part in parts.named().values()]
        assert not any("copy" in part for part in holding)
        assert any({"d 4", "near"} <= part for part in holding)
        assert any("copies" in note for note in parts.notes)
        assert any("kept together" in note for note in parts.notes)
        require_disjoint(parts.named())


def test_too_few_documents_say_how_many(random_generator):
    with pytest.raises(DataError, match=r"Found 5 different documents; at least 8"):
        split_documents(documents(random_generator, 5))
    with pytest.raises(DataError, match=r"Found 1 different document;"):
        split_documents(documents(random_generator, 1) * 20)


def test_one_text_in_disguise_is_refused(random_generator):
    base = words(random_generator, 400)
    given = [Document(f"{base} {words(random_generator, 5)}", "d", f"v{index}") for index in range(20)]
    with pytest.raises(DataError, match="without shared text"):
        split_documents(given)


def test_overlap_of_parts_made_by_hand_names_the_documents(random_generator):
    mine, yours = documents(random_generator, 4, "mine"), documents(random_generator, 4, "yours")
    require_disjoint({"calibrate": mine, "confirm": yours})
    leak = Document(words(random_generator, 50) + " " + mine[2].text, "yours", "leaky.txt, document 9")
    with pytest.raises(DataError, match=r"leaky\.txt, document 9 \(confirm\) shares 6\d% .* calibrate"):
        require_disjoint({"calibrate": mine, "confirm": [*yours, leak]})


def test_much_text_is_thinned_with_a_note(random_generator):
    given = documents(random_generator, 50)
    parts = split_documents(given, max_bytes=20 * given[0].text_bytes)
    assert sum(len(part) for part in parts.named().values()) == 20
    assert "drawn at random" in parts.notes[0]


def test_hashes_do_not_collide(random_generator):
    text = " ".join(str(number) for number in random_generator.permutation(200_000))
    assert len(shingle_hashes(text, words=1)) == 200_000
    assert np.all(np.diff(shingle_hashes(text).astype(object)) > 0)
