"""One model's texts and reference: what calibrates, what chooses among our own, and what judges.

Calibration and choosing windows come from one text, judging windows from another. Calibration windows are cut anew out
of their own decoded text, which is what llama-imatrix reads: so it sees the very same tokens.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kl_settings import divergence, windows_of
from numpy.typing import NDArray

from trilemma.data.documents import Prepare, prepare_text
from trilemma.formats.artifact import load_any
from trilemma.measure.quality.texts import bos_of, tokenizer_of
from trilemma.runtime import open_engine
from trilemma.runtime.engine import Engine, EngineOptions

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Tokens = NDArray[np.int32]
CHARACTERS = 12_000_000  # of a text that are read


@dataclass(frozen=True)
class Yard:
    """Windows are int32 (n, context); `reference` f32 logits (choosing then judging, context, vocab), mapped from disk.

    key: of texts, windows and context; figures of different keys can not be compared.
    """

    model: Path
    name: str
    calibration: Tokens
    calibration_text: str
    choosing: Tokens
    judging: Tokens
    reference: Float32
    key: str
    threads: int

    @property
    def context(self) -> int:
        return int(self.judging.shape[1])

    def options(self) -> EngineOptions:
        """Defaults but for context and threads: a user's settings are the question."""
        return EngineOptions(threads=self.threads, max_context=self.context)

    def divergences(self, engine: Engine) -> tuple[Float64, Float64]:
        """Mean KL (nats a token) of each choosing and each judging window; the engine is closed."""
        try:
            found = np.asarray([
                divergence(exact, engine.logits(window)).mean()
                for exact, window in zip(self.reference, (*self.choosing, *self.judging), strict=True)
            ])  # fmt: skip
        finally:
            engine.close()
        return found[: len(self.choosing)], found[len(self.choosing) :]


def read_text(path: Path, prepare: Prepare) -> str:
    """A text, or one that xz packed; marks between documents become line ends."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        return prepare_text(file.read(CHARACTERS).replace("<|endoftext|>", "\n"), prepare)


def split(windows: Sequence[Tokens], choosing: int) -> tuple[list[Tokens], list[Tokens]]:
    """(those that calibrate, those that choose), the latter spread evenly."""
    if not choosing:
        return list(windows), []
    taken = set(np.linspace(0, len(windows) - 1, choosing).round().astype(int).tolist())
    kept = [window for at, window in enumerate(windows) if at not in taken]
    return kept, [windows[at] for at in sorted(taken)]


def make_yard(model: Path, calibrate: str, judge: str, work: Path, *, context: int, windows: tuple[int, int, int],
              threads: int) -> Yard:  # fmt: skip
    """Cut the windows (calibrating, choosing, judging) and compute the reference, or find them in `work`."""
    asked = repr((calibrate, judge, context, windows, (model / "tokenizer.json").read_bytes()))
    cut = work / f"windows-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.npz"
    if not cut.exists():
        np.savez(cut, **_cut(model, calibrate, judge, context, windows))
    with np.load(cut) as held:
        text, parts = str(held["text"]), [held[name] for name in ("calibration", "choosing", "judging")]
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts))
    key = f"{digest.hexdigest()[:12]}-{context}"
    path = work / f"{model.name}-{key}-reference.npy"
    if not path.exists():
        _write_reference(model, path, [*parts[1], *parts[2]], threads)
    return Yard(model, model.name, parts[0], text, parts[1], parts[2], np.load(path, mmap_mode="r"), key, threads)


def _cut(model: Path, calibrate: str, judge: str, context: int, windows: tuple[int, int, int]) -> dict[str, Any]:
    """The three kinds of windows, and the text whose tokens calibrate."""
    tokenizer = tokenizer_of(load_any(model))
    calibrating, choosing = split(windows_of(model, calibrate, context, windows[0] + windows[1]), windows[1])
    text = "".join(tokenizer.decode(window.tolist()) for window in calibrating)
    tokens = np.asarray(tokenizer.encode(text), np.int32)
    whole = tokens[: len(tokens) // context * context].reshape(-1, context)[: windows[0]].copy()
    if bos := bos_of(tokenizer):
        whole[:, 0] = bos[0]  # as llama-imatrix does
    judging = np.stack(windows_of(model, judge, context, windows[2]))
    chosen = np.asarray(choosing, np.int32).reshape(-1, context)
    return {"text": np.asarray(text), "calibration": whole, "choosing": chosen, "judging": judging}


def _write_reference(model: Path, path: Path, windows: Sequence[Tokens], threads: int) -> None:
    """f32 logits of the unquantized model by the torch reference, at once or not at all."""
    options = EngineOptions(threads=threads, max_context=len(windows[0]), kv_cache="f32")
    engine = open_engine(model, runtime="torch", options=options)
    partial = path.with_suffix(".partial.npy")
    try:
        vocab = engine.config.vocab_size
        shape = (len(windows), len(windows[0]), vocab)
        logits = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        for at, window in enumerate(windows):
            logits[at] = engine.logits(window)
        logits.flush()
    finally:
        engine.close()
    partial.rename(path)
