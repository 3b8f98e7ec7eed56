"""A whole search in seconds: a tiny random checkpoint with a tokenizer, and text made of its words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from trilemma.model.tokenizer import Tokenizer
from trilemma.model.write import write_checkpoint

VOCABULARY = ["<unk>", *(a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "lnrst")]  # 301 words


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class TinyCheckpoint:
    """A folder that `optimize` accepts."""

    path: Path
    tokenizer: Tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint(tiny_model(seed=5, dim=64, ffn=96, vocab=len(VOCABULARY), context=96), folder, dtype="bf16")
    words = Words(WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    return TinyCheckpoint(folder, Tokenizer.load(folder))


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 documents of 150 to 250 words."""
    rng = np.random.default_rng(0)
    made = [" ".join(rng.choice(VOCABULARY[1:], int(rng.integers(150, 250)))) for _ in range(30)]
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text("<|endoftext|>".join(made), encoding="utf-8")
    return path
