"""The reference's full next-token distributions, kept in a bounded memory-mapped file.

16 bits a value (see `token_scores.PackedLogProbs`); negative log-likelihoods and most likely tokens
are kept beside them in full precision, so perplexity and agreement are exact.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import DataError, EngineError, OutputError
from trilemma.data.windows import TokenSet
from trilemma.measure.quality.token_scores import PackedLogProbs, log_normalizer, pack_log_probs, token_nll
from trilemma.runtime.engine import Engine

Progress = Callable[[int, int, str], None]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

LARGEST_BYTES = 4_000_000_000
LEAST_WINDOWS = 5


@dataclass
class Reference:
    """What the unmodified model in f32 says of a token set. Made by `build`; rows are scored tokens.

    token_set: what was scored (shorter than asked for where a note says so);
    nll: (rows,) nats; best: (rows,) most likely token; notes: what the user should know.
    """

    token_set: TokenSet
    asked_hash: str
    engine_name: str
    nll: Float64
    best: NDArray[np.int32]
    top: Float32
    step: Float32
    codes: NDArray[np.uint16]
    notes: tuple[str, ...] = ()
    starts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = np.concatenate(([0], np.cumsum(self.token_set.predicted))).astype(np.int64)

    @property
    def vocab_size(self) -> int:
        return int(self.codes.shape[1])

    def window(self, index: int) -> PackedLogProbs:
        rows = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return PackedLogProbs(self.codes[rows], self.top[rows], self.step[rows])

    @classmethod
    def build(
        cls,
        engine: Engine,
        token_set: TokenSet,
        cache_dir: str | Path | None = None,
        *,
        key: str = "",
        max_bytes: int = LARGEST_BYTES,
        progress: Progress | None = None,
    ) -> Reference:
        """Score a token set with the reference engine, or find it in the cache.

        Args:
            engine: the unmodified weights in f32 arithmetic.
            token_set: windows to score; shortened, with a note, when the file would pass `max_bytes`.
            cache_dir: where the file lies (a temporary folder when None).
            key: identity of the model (its hash); only with it is an earlier file used again.
            max_bytes: bound on the file.
            progress: called with (done, total, what).

        Raises:
            DataError: `max_bytes` does not hold five windows.
            EngineError: the engine's logits are not finite.
            OutputError: the file can not be written.
        """
        bounded, notes = bound_token_set(token_set, engine.config.vocab_size, max_bytes)
        folder: Path | None = None
        try:
            folder, kept = _folder(cache_dir, key, bounded)
            if not (folder / "rows.npz").exists():
                _write(engine, bounded, folder, progress)
        except OSError as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise OutputError(
                f"The reference's log-probabilities can not be written to '{folder or cache_dir}': "
                f"{error.strerror or error}. Free space there, give another cache folder, or measure on fewer tokens."
            ) from None
        with np.load(folder / "rows.npz") as rows:
            nll, best, top, step = rows["nll"], rows["best"], rows["top"], rows["step"]
        codes = np.memmap(folder / "codes.u16", dtype=np.uint16, mode="r", shape=(len(nll), engine.config.vocab_size))
        found = cls(bounded, token_set.hash, engine.name, nll, best, top, step, codes, notes)
        if not kept:
            weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
        return found


def bound_token_set(token_set: TokenSet, vocab_size: int, max_bytes: int) -> tuple[TokenSet, tuple[str, ...]]:
    """Shorten a token set, evenly over its documents, until the reference fits.

    Raises:
        DataError: fewer than five windows would be left.
    """
    rows = max_bytes // (2 * vocab_size)
    if token_set.predicted_tokens <= rows:
        return token_set, ()
    order = np.argsort(_turns(token_set.documents), kind="stable")  # first windows of all documents first
    sizes = np.cumsum(token_set.predicted[order])
    count = int(np.searchsorted(sizes, rows, side="right"))
    if count < min(LEAST_WINDOWS, len(token_set.windows)):
        raise DataError(
            f"The reference's log-probabilities need 2 x {vocab_size} bytes a token; {max_bytes} bytes hold {count} "
            f"windows of {token_set.context} tokens; {LEAST_WINDOWS} are needed. Raise the bound or cut shorter."
        )
    kept = token_set.take(np.sort(order[:count]))
    note = (
        f"quality is measured on {kept.predicted_tokens} of {token_set.predicted_tokens} tokens: the reference of all "
        f"would take {token_set.predicted_tokens * 2 * vocab_size / 1e9:.1f} GB"
    )
    return kept, (note,)


def window_logits(engine: Engine, token_set: TokenSet, index: int) -> Float32:
    """Logits that predict the scored tokens of a window, (predicted, vocab).

    Raises:
        EngineError: the window is longer than the engine's context.
    """
    window = token_set.windows[index]
    if len(window) > engine.max_context:
        raise EngineError(
            f"A window of {len(window)} tokens does not fit the engine's context of {engine.max_context}. "
            f"Measure with a context of at most {engine.max_context}."
        )
    return engine.logits(window)[len(window) - 1 - int(token_set.predicted[index]) : -1]


def require_finite(normalizer: Float64, window: int, engine: Engine) -> None:
    """Raises EngineError when a row of logits held NaN or infinity: a collapsed model must not pass."""
    bad = np.flatnonzero(~np.isfinite(normalizer))
    if bad.size:
        raise EngineError(
            f"The engine '{engine.name}' gave logits that are not finite in window {window}, position {bad[0]} "
            f"({bad.size} of {normalizer.size} positions). The model overflowed: give the failing layers more bits or "
            "wider activations."
        )


class RowPool:
    """Runs a function over slices of rows in threads; numpy frees the interpreter while it computes."""

    def __init__(self, threads: int) -> None:
        self._threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self._threads)

    def slices(self, rows: int) -> list[slice]:
        size = max(1, -(-rows // self._threads))
        return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]

    def map(self, work: Callable[[slice], object], rows: int) -> None:
        list(self._pool.map(work, self.slices(rows)))

    def __enter__(self) -> RowPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _folder(cache_dir: str | Path | None, key: str, token_set: TokenSet) -> tuple[Path, bool]:
    """A named folder that is kept and found again, or without a key one of the reference's own."""
    if cache_dir is not None:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    if cache_dir is not None and key:
        folder = Path(cache_dir) / f"reference-{key}-{token_set.hash}"
        folder.mkdir(exist_ok=True)
        return folder, True
    return Path(tempfile.mkdtemp(prefix="reference-", dir=cache_dir)), False


def _write(engine: Engine, token_set: TokenSet, folder: Path, progress: Progress | None) -> None:
    rows = token_set.predicted_tokens
    nll, best = np.empty(rows, np.float64), np.empty(rows, np.int32)
    top, step = np.empty(rows, np.float32), np.empty(rows, np.float32)
    at = 0
    with (folder / "codes.u16").open("wb") as file, RowPool(engine.threads) as pool:
        for index, packed, window_nll, window_best in _scored(engine, token_set, pool):
            packed.codes.tofile(file)
            here = slice(at, at + len(window_nll))
            nll[here], best[here], top[here], step[here] = window_nll, window_best, packed.top, packed.step
            at += len(window_nll)
            if progress is not None:
                progress(index + 1, len(token_set.windows), "reference")
    # Last, under a temporary name: a file of rows means that the folder is complete.
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as temporary:
        np.savez(temporary, nll=nll, best=best, top=top, step=step)
    Path(temporary.name).replace(folder / "rows.npz")


def _scored(
    engine: Engine, token_set: TokenSet, pool: RowPool
) -> Iterator[tuple[int, PackedLogProbs, Float64, NDArray[np.int32]]]:
    for index in range(len(token_set.windows)):
        logits = window_logits(engine, token_set, index)
        count, vocab = logits.shape
        normalizer = np.empty(count, np.float64)
        best = np.empty(count, np.int32)
        packed = PackedLogProbs(
            np.empty((count, vocab), np.uint16), np.empty(count, np.float32), np.empty(count, np.float32)
        )

        def work(
            rows: slice,
            logits: Float32 = logits,
            normalizer: Float64 = normalizer,
            best: NDArray[np.int32] = best,
            packed: PackedLogProbs = packed,
        ) -> None:
            normalizer[rows] = log_normalizer(logits[rows])
            best[rows] = logits[rows].argmax(axis=1)
            with np.errstate(all="ignore"):
                part = pack_log_probs(logits[rows], normalizer[rows])
                packed.codes[rows], packed.top[rows], packed.step[rows] = part.codes, part.top, part.step

        pool.map(work, count)
        require_finite(normalizer, index, engine)
        yield index, packed, token_nll(logits, token_set.targets(index), normalizer), best


def _turns(documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each window, how many windows of its document come before it."""
    seen: dict[int, int] = {}
    turns = np.empty(len(documents), np.int64)
    for at, document in enumerate(documents):
        turns[at] = seen.get(int(document), 0)
        seen[int(document)] = int(turns[at]) + 1
    return turns
