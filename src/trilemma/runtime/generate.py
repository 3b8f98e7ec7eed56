"""From engine tokens to text: whole characters only, and nothing past a stop string."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime.engine import Engine, Generation, SamplingSettings


class StopStrings:
    """Lets text through until a stop string occurs, however it is cut into pieces.

    Text that may be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now; nothing any more once `found` is set."""
        if self.found is not None:
            return ""
        self._held += text
        hits = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if hits:
            position, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            shown, self._held = self._held[:position], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """The rest, when no more text comes."""
        shown, self._held = self._held, ""
        return shown


def generate_with_text(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    settings: SamplingSettings,
    on_text: Callable[[str], bool | None],
    stop: Sequence[str] = (),
) -> Generation:
    """Continue `prompt` (token ids); `on_text` sees each new piece of text, and returning False stops.

    Returns:
        The engine's record; its finish_reason is 'stop' where a stop string ended it.
    """
    stream, stops = tokenizer.stream(prompt), StopStrings(stop)

    def show(text: str) -> bool:
        return not text or on_text(text) is not False

    def on_token(token: int) -> bool:
        return show(stops.push(stream.push(token))) and stops.found is None

    done = engine.generate(prompt, settings, on_token)
    if stops.found is not None:
        return replace(done, finish_reason="stop")
    if show(stops.push(stream.flush())) and stops.found is None:
        show(stops.flush())
    return done


def generate_text(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    settings: SamplingSettings | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Text as it is generated. The engine works in a thread of its own, which ends when the iterator is closed.

    Args:
        prompt: text (BOS is added as the tokenizer does), or token ids.

    Raises:
        InputError: as `Engine.generate`, at the first step of the iteration.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    closed = threading.Event()

    def on_text(text: str) -> bool:
        pieces.put(text)
        return not closed.is_set()

    def work() -> None:
        try:
            generate_with_text(engine, tokenizer, ids, settings or SamplingSettings(), on_text, stop)
            pieces.put(None)
        except BaseException as error:  # handed over to the iterating thread
            pieces.put(error)

    worker = threading.Thread(target=work, name="trilemma-generate", daemon=True)
    worker.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        closed.set()
        worker.join()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
