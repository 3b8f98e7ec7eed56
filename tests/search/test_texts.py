"""Three disjoint parts in the model's tokens, found again from their files."""

from pathlib import Path

import pytest

from trilemma.core.errors import DataError
from trilemma.model.tokenizer import Tokenizer
from trilemma.search.texts import describe_files, prompts_of, read_texts


def test_parts_are_disjoint_and_described(tiny_checkpoint, tiny_text):
    texts = read_texts([tiny_text], tiny_checkpoint.tokenizer, 32, 0, "none")
    parts = texts.parts.named()
    assert [len(part) >= least for part, least in zip(parts.values(), (2, 3, 3), strict=True)] == [True] * 3
    everything = [document.text for part in parts.values() for document in part]
    assert len(set(everything)) == len(everything)
    used = {name: texts.token_set(name, 500) for name in ("select", "confirm")}
    described = {part.name: part for part in texts.describe(used)}
    assert described["select"].tokens == used["select"].tokens >= 400
    assert described["calibrate"].tokens == texts.calibration.size > 0
    assert described["confirm"].documents == len(parts["confirm"])


def test_the_same_files_give_the_same_parts_and_another_seed_others(tiny_checkpoint, tiny_text):
    def read(seed):
        return read_texts([tiny_text], tiny_checkpoint.tokenizer, 32, seed, "none")

    assert read(1).calibration_record == read(1).calibration_record
    assert read(1).parts == read(1).parts
    assert read(1).parts != read(2).parts


def test_checksums_change_with_the_file(tiny_text, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(tiny_text.read_bytes())
    (before,) = describe_files([copy])
    assert before.sha256 == describe_files([tiny_text])[0].sha256
    copy.write_bytes(copy.read_bytes() + b".")
    assert describe_files([copy])[0].sha256 != before.sha256


def test_prompts_come_from_different_documents(tiny_checkpoint, tiny_text):
    texts = read_texts([tiny_text], tiny_checkpoint.tokenizer, 32, 0, "none")
    prompts = prompts_of(texts.parts.confirm, texts.tokenizer, 4, 6)
    assert [len(prompt) for prompt in prompts] == [6] * 4
    assert len({tuple(prompt) for prompt in prompts}) == 4
    assert prompts_of(texts.parts.confirm, texts.tokenizer, 3, 100_000) == []


def test_too_few_documents(tiny_checkpoint, tmp_path):
    (tmp_path / "short.txt").write_text("one two three")
    with pytest.raises(DataError):
        read_texts([tmp_path / "short.txt"], tiny_checkpoint.tokenizer, 32, 0, "none")


def test_a_mixture_reaches_calibration_and_is_found_again(hearth_path, texts_path):
    """`check` reads the files again from the report, as they were named."""
    data = [f"{texts_path}:0.25", f"{texts_path.with_name('adults.txt')}:0.75"]
    tokenizer = Tokenizer.load(hearth_path)
    texts = read_texts(data, tokenizer, 256, 3, "none")
    assert texts.calibration_record.weights == (0.25, 0.75)
    assert [file.path for file in texts.files] == data
    assert describe_files([Path(file.path) for file in texts.files]) == texts.files
    plain = read_texts([texts_path, texts_path.with_name("adults.txt")], tokenizer, 256, 3, "none")
    assert plain.calibration_record.weights is None
    assert [item.source for item in plain.parts.confirm] == [item.source for item in texts.parts.confirm]
