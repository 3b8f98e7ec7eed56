"""Work shared out among threads that each compute alone.

At these sizes, threads that share every single operation wait for each other more than they compute, above all on a
busy machine.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from trilemma.core.environment import usable_cores

_BATCH_TOKENS = 512  # a layer's activations then stay in cache; larger batches were 3 times slower
_MOST_WALKERS = 8  # each has a batch's activations of its own

Item = TypeVar("Item")
Result = TypeVar("Result")
Task = Callable[[], None]


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int | None, stop: Task | None = None
) -> list[Result]:
    """`work` of every item, in order, by so many threads (None: all cores) that compute alone; no gradients.

    stop: called when something failed or the user interrupts, before what is under way is waited for.
    """

    def alone(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    count = threads or usable_cores()
    with _single_threaded(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(alone, items))
        except BaseException:
            if stop is not None:
                stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            give_back_memory()


def by_batches(work: Callable[[slice], Sequence[Task]], windows: int, context: int, threads: int | None) -> None:
    """`work` of batches of windows, by threads that compute alone.

    It returns tasks, as many for every batch: those of the same place wait for each other and are done in the order of
    the batches, so what they add up does not depend on the threads.
    """
    step = max(1, _BATCH_TOKENS // context)
    batches = [slice(first, min(first + step, windows)) for first in range(0, windows, step)]
    walkers = max(1, min(threads or usable_cores(), _MOST_WALKERS, len(batches)))
    turns = _Turns()

    def walk(first: int) -> None:
        try:
            for number in range(first, len(batches), walkers):
                if turns.over:
                    return
                for place, task in enumerate(work(batches[number])):
                    turns.take(place, number, task)
        except BaseException:
            turns.end()
            raise

    side_by_side(walk, range(walkers), walkers, stop=turns.end)


class _Turns:
    """Of each place, tasks in the order of their numbers; `over` once something failed."""

    def __init__(self) -> None:
        self.over = False
        self._next: dict[int, int] = defaultdict(int)
        self._changed = threading.Condition()

    def take(self, place: int, number: int, task: Task) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.over or self._next[place] == number)
            if self.over:
                return
        task()
        with self._changed:
            self._next[place] += 1
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self.over = True
            self._changed.notify_all()


def give_back_memory() -> None:
    """Let the system have what was freed: glibc keeps a heap for each thread, and holes in it count as resident."""
    with suppress(OSError, AttributeError, TypeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _single_threaded() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
