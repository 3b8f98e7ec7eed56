"""Where the teacher's next-token distributions come from: its torch module, another program, or a file kept of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilemma.core.errors import TrainingError
from trilemma.model.decoder import Decoder
from trilemma.techniques.distill.losses import FullRows, LogitRows, TeacherRows, TopRows, WholeRows

TeacherLogits = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""(windows, time) token ids -> (windows, time, vocab) logits, as an engine makes them."""


class Teacher(Protocol):
    """Answers for whole windows; the same windows in the same batch give the same bits."""

    def rows(self, numbers: Tensor, inputs: Tensor) -> TeacherRows:
        """numbers (batch,) of the windows, inputs (batch, time) -> rows in the order of inputs.flatten()."""
        ...


class WholeTeacher(Teacher, Protocol):
    """One that knows the whole distribution."""

    def rows(self, numbers: Tensor, inputs: Tensor) -> WholeRows: ...


class TorchTeacher:
    """A frozen decoder; no gradients, no dropout."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder.requires_grad_(False).eval()

    def rows(self, numbers: Tensor, inputs: Tensor) -> FullRows:
        with torch.no_grad():
            hidden = self.decoder.final_norm(self.decoder.hidden(inputs))
        return FullRows(hidden.flatten(0, 1), head_of(self.decoder))


class OutsideTeacher:
    """Logits from a function, such as an engine's."""

    def __init__(self, logits: TeacherLogits, vocab_size: int) -> None:
        self.logits, self.vocab_size = logits, vocab_size

    def rows(self, numbers: Tensor, inputs: Tensor) -> LogitRows:
        found = np.asarray(self.logits(inputs.cpu().numpy()))
        if found.shape != (*inputs.shape, self.vocab_size):
            raise TrainingError(
                f"The teacher gave logits of shape {found.shape} for windows of shape {tuple(inputs.shape)}; expected "
                f"{(*inputs.shape, self.vocab_size)}. Teacher and student need the same vocabulary."
            )
        return LogitRows(torch.from_numpy(found).to(inputs.device).flatten(0, 1))


class KeptTeacher:
    """The k most likely tokens of each position, kept in a file at first sight: later epochs ask no teacher.

    The file holds ids (uint16 or uint32) and log-probabilities (float16) of every window, 4 or 6 bytes an entry,
    and is memory-mapped. What is returned is always what was kept, also at first sight, so that a resumed
    run sees the same values.

    Args:
        teacher: asked once a window.
        shape: (windows, time) of all inputs.
        top: entries a position; at most the vocabulary.
        path: of the file; one of another identity or size is written anew.
        identity: of teacher and windows.
    """

    def __init__(
        self, teacher: WholeTeacher, shape: tuple[int, int], vocab_size: int, top: int, path: Path, identity: str
    ) -> None:
        self.teacher, self.top = teacher, min(top, vocab_size)
        id_type = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
        entry = np.dtype([("id", id_type), ("log_prob", "<f2")])
        row = np.dtype([("known", "u1"), ("top", entry, (shape[1], self.top))])
        mark = hashlib.sha256(f"{identity} {shape} top {self.top} of {vocab_size}".encode()).digest()
        _open_store(path, mark, len(mark) + shape[0] * row.itemsize)
        self._kept = np.memmap(path, dtype=row, mode="r+", offset=len(mark), shape=(shape[0],))

    def rows(self, numbers: Tensor, inputs: Tensor) -> TopRows:
        wanted = numbers.cpu().numpy()
        fresh = self._kept["known"][wanted] == 0
        if fresh.any():
            self._ask(wanted[fresh], numbers[torch.from_numpy(fresh)], inputs[torch.from_numpy(fresh)])
        found = self._kept["top"][wanted]
        ids = torch.from_numpy(found["id"].astype(np.int64)).flatten(0, 1)
        log_probs = torch.from_numpy(found["log_prob"].astype(np.float32)).flatten(0, 1)
        return TopRows(ids.to(inputs.device), log_probs.to(inputs.device))

    def _ask(self, places: NDArray[np.int64], numbers: Tensor, inputs: Tensor) -> None:
        rows = self.teacher.rows(numbers, inputs)
        count = inputs.numel()
        ids, log_probs = [], []
        for start in range(0, count, 256):
            found = rows.log_probs(slice(start, min(start + 256, count))).topk(self.top, dim=-1)
            ids.append(found.indices.cpu())
            log_probs.append(found.values.cpu())
        shape = (*inputs.shape, self.top)
        self._kept["top"]["id"][places] = torch.cat(ids).reshape(shape).numpy()
        self._kept["top"]["log_prob"][places] = torch.cat(log_probs).reshape(shape).numpy()
        self._kept["known"][places] = 1


def _open_store(path: Path, mark: bytes, size: int) -> None:
    """Leave the file when it is of this mark and size, else make an empty one; it takes disk space as it fills."""
    if path.exists() and path.stat().st_size == size:
        with path.open("rb") as file:
            if file.read(len(mark)) == mark:
                return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(mark)
        file.truncate(size)


def head_of(decoder: Decoder) -> Tensor:
    """The matrix that makes logits, (vocab, dim)."""
    return decoder.embedding.weight if decoder.head is None else decoder.head.weight


def decoder_identity(decoder: Decoder) -> str:
    """A short digest of a decoder's sizes and of some values of every tensor."""
    digest = hashlib.sha256(decoder.config.model_dump_json().encode())
    for name, tensor in decoder.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 512)].float().cpu().numpy()
        digest.update(name.encode() + some.tobytes())
    return digest.hexdigest()[:16]
