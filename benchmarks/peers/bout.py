"""One model in one format and the engines that hold it: each peer's set-up is chosen, groups of cells run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from peers.book import Book
from peers.cells import Cell, Group
from peers.engines_of import ENGINES, KV, EngineFailedError, Files, Setup, run_worker
from peers.ways import Way, changes_of, combined, default_of, fixed_by_cache, words_of
from trilemma.formats.artifact import load_any
from trilemma.formats.pack import format_bytes
from trilemma.model.cost import decode_bytes_per_token, macs_per_token, prompt_macs
from trilemma.model.model import Model


@dataclass
class Bout:
    """One model in one format with one kind of cache."""

    shape: str
    storage: str
    files: Files
    setup: Setup
    book: Book
    engines: list[str]
    trials: bool = True  # else peers run as they are by default
    best: dict[tuple[str, str], Way] = field(default_factory=dict)  # (engine, setting of a cell) -> way
    failed: set[tuple[str, str]] = field(default_factory=set)  # (engine, group), told once and not asked again

    def __post_init__(self) -> None:
        self.model: Model = load_any(self.files.artifact)

    @property
    def about(self) -> dict[str, Any]:
        return {"shape": self.shape, "format": self.storage, "kv": self.setup.kv, "threads": self.setup.threads}

    def play(self, group: Group, turn: int) -> None:
        """One round: every engine that has not run these cells in it, in an order that turns with the rounds."""
        engines = self._asked(group)
        first = turn % len(engines)
        for engine in [*engines[first:], *engines[:first]]:
            left = tuple(cell for cell in group.cells if not self.book.has_run(**self.about, engine=engine,
                                                                              cell=cell.name, round=turn))  # fmt: skip
            if not left or (engine, group.name) in self.failed:
                continue
            self._choose(engine, group)
            for way, cells in self._by_way(engine, left):
                if self._run(engine, Group(group.name, cells), way, turn) is None:
                    self.failed.add((engine, group.name))

    def is_done(self, group: Group, turn: int) -> bool:
        return all(
            (engine, group.name) in self.failed
            or self.book.has_run(**self.about, engine=engine, cell=cell.name, round=turn)
            for engine in self._asked(group)
            for cell in group.cells
        )

    def _asked(self, group: Group) -> list[str]:
        """Engines that take part; the graphs of others are compiled when they are opened, which no user waits for."""
        asked = [name for name in self.engines if name in ("ours", "llama.cpp")]
        return asked if group.name == "open" else self.engines

    def seconds(self, group: Group) -> float:
        """What a round of the group took the last time; 0 where that is not known."""
        return sum(self.book.seconds(**self.about, engine=engine, cell=group.cells[0].name) for engine in self.engines)

    def _choose(self, engine: str, group: Group) -> None:
        """The best set-up for each cell: the default, changes of one setting, and what of them helped together."""
        cells = [cell for cell in group.cells if (engine, cell.setting) not in self.best]
        if not cells:
            return
        base = default_of(engine, self.storage)
        if cells[0].setting == "deep":  # what memory and kernels like was found at depth 0; one depth is enough
            base, cells = {**base, **self._told(engine, "decode at 0")}, cells[:1]
        told = [self._told(engine, cell.name) for cell in cells]
        changes: list[Way] = []
        for cell in cells if self.trials else []:
            found = changes_of(engine, self.storage, self.setup.kv, cell)
            changes += [change for change in found if change not in changes]
        if not changes or all(told):
            self.best |= {(engine, cell.setting): way or base for cell, way in zip(cells, told, strict=True)}
            return
        trial = Group(group.name, tuple(replace(cell, repeats=1) for cell in cells))
        runs = [(change, self._run(engine, trial, {**base, **change}, None)) for change in ({}, *changes)]
        for index, cell in enumerate(trial.cells):
            tried = [({**base, **change}, change, max(rates[index])) for change, rates in runs if rates]
            self.best[engine, cell.setting] = self._fastest(engine, cell, base, tried)

    def _fastest(self, engine: str, cell: Cell, base: Way, tried: list[tuple[Way, Way, float]]) -> Way:
        if not tried:
            return base
        way, _, rate = max(tried, key=lambda one: one[2])
        default = next((rate for _, change, rate in tried if not change), 0.0)
        both = combined(base, [(change, rate) for _, change, rate in tried], default)
        if both is not None and (rates := self._run(engine, Group(cell.name, (cell,)), both, None)):
            return both if max(rates[0]) > rate else way
        return way

    def _told(self, engine: str, cell: str) -> Way:
        """The best way by trials that are in the book, else by those with the usual cache; empty without any."""
        for kv in (self.setup.kv, "16"):
            found = self.book.trials(**{**self.about, "kv": kv}, engine=engine, cell=cell)
            if found:
                way = dict(max(found, key=lambda row: max(row["rates"]))["way"])
                return way if kv == self.setup.kv else {**way, **fixed_by_cache(engine)}
        return {}

    def _by_way(self, engine: str, cells: tuple[Cell, ...]) -> Iterator[tuple[Way, tuple[Cell, ...]]]:
        chosen = [(self.best.get((engine, cell.setting), default_of(engine, self.storage)), cell) for cell in cells]
        ways: list[Way] = []
        for way, _ in chosen:
            if way not in ways:
                ways.append(way)
        for way in ways:
            yield way, tuple(cell for own, cell in chosen if own == way)

    def _run(self, engine: str, group: Group, way: Way, turn: int | None) -> list[list[float]] | None:
        """One process; its rates, or None where it failed, which is told and written down."""
        began = time.perf_counter()
        try:
            found = ENGINES[engine](self.setup, self.files, self.storage, group, way)
        except EngineFailedError as error:
            self.book.add("failed", **self.about, engine=engine, way=way, group=group.name, reason=str(error))
            tell(f"{engine} ({words_of(way)}) failed on {group.name}: {error}")
            return None
        rates: list[list[float]] = found.pop("rates")
        reads: list[list[float]] = found.pop("reads", [[]] * len(rates))
        seconds = round(time.perf_counter() - began, 2)
        for cell, values, beside in zip(group.cells, rates, reads, strict=True):
            self.book.add(
                "trial" if turn is None else "run", **self.about, engine=engine, way=way, round=turn, cell=cell.name,
                rates=values, seconds=seconds, **({"reads": beside} if beside else {}), **self._cost(cell),
                **{name: value for name, value in found.items() if not isinstance(value, dict)},
            )  # fmt: skip
        what = ", ".join(f"{cell.name}: {max(own):.4g}" for cell, own in zip(group.cells, rates, strict=True))
        when = "trial" if turn is None else f"round {turn + 1}"
        name = f"{self.shape} {self.storage} kv {self.setup.kv} {engine} {words_of(way)}".strip()
        tell(f"{name}, {when}: {what} tokens/s ({seconds:.0f} s)")
        return rates

    def _cost(self, cell: Cell) -> dict[str, float]:
        """Bytes read and multiplications made for one token of one sequence, on average, in our formats."""
        config, weights = self.model.config, self.step_bytes(0)
        if cell.kind == "open":
            return {}
        if cell.kind == "prefill":
            macs = prompt_macs(config, cell.tokens) / cell.tokens
            return {"bytes_per_token": weights / cell.tokens, "step_bytes": weights, "macs_per_token": macs}
        at = cell.depth + cell.tokens // 2
        cache = self.step_bytes(at) - weights
        return {
            "bytes_per_token": weights / cell.batch + cache, "step_bytes": weights + cell.batch * cache,
            "macs_per_token": macs_per_token(config, at),
        }  # fmt: skip

    def step_bytes(self, context: int) -> int:
        """Bytes that a step of one sequence reads: the weights that are multiplied, and its cache."""
        kv = KV[self.setup.kv]["ours"]
        return decode_bytes_per_token(self.model.config, self.model.format_of, kv, context, format_bytes)

    def probe(self, program: str | None, context: int = 0) -> None:
        """The machine's limits, by a fresh process, over as many bytes as a step at this context reads."""
        size = self.step_bytes(context)
        task = {"threads": self.setup.threads, "bytes": size, "program": program, "model": str(self.files.artifact)}
        try:
            self.book.add("ceilings", **self.about, bytes=size, **run_worker(sys.executable, "ceilings", task))
        except EngineFailedError as error:
            tell(f"no ceilings for {self.shape} {self.storage}: {error}")


def tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


__all__ = ["Bout", "tell"]
