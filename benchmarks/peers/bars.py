"""What the native engine is meant to reach, held against what was measured: one line a bar, met or not.

A bar names model, format and cell in the words of the table; one that nobody measured is listed as open. Ratios are
medians of rounds in which both engines ran.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peers.summary import Figure, Row, ceilings_of, figures_of

LARGE, MIDDLE, SMALL, TINY = "Llama-3.2-1B", "llama-316M", "SmolLM2-135M", "stories-15M"
INT4, INT8 = "int4-g32", "int8-g32"
BYTES_APART = 0.01  # files of both engines, for "at equal bytes"
MORE_MEMORY = 32 * 2**20  # bytes beside weights and cache
Key = tuple[str, str, str, str]  # shape, format, kv, cell


@dataclass(frozen=True)
class Bar:
    """`found` is None where nothing was measured; `least` says in which direction a bar holds."""

    what: str
    where: str
    needed: float
    found: float | None
    least: bool = True
    words: str = ""
    percent: bool = False

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        return self.found >= self.needed if self.least else self.found <= self.needed

    def line(self) -> str:
        show: Callable[[float], str] = (
            (lambda value: f"{value:.0%}") if self.percent else (lambda value: f"{value:.2f}")
        )
        found = "not measured" if self.found is None else show(self.found)
        verdict = {True: "met", False: "NOT MET", None: "open"}[self.met]
        sign = ">=" if self.least else "<="
        return f"| {verdict} | {self.where} | {self.what} | {sign} {show(self.needed)} | {found} | {self.words} |"


def bars_table(rows: Sequence[Row]) -> str:
    """All bars as a Markdown table, with a count at the end."""
    bars = list(bars_of(rows))
    lines = ["| verdict | model, format, cell | what | needed | found | more |", "|---|---|---|---|---|---|"]
    lines += [bar.line() for bar in bars]
    counts = {verdict: sum(bar.met is verdict for bar in bars) for verdict in (True, False, None)}
    return "\n".join([*lines, "", f"{counts[True]} met, {counts[False]} not met, {counts[None]} not measured"])


def bars_of(rows: Sequence[Row]) -> Iterator[Bar]:
    figures = {(one.shape, one.format, one.kv, one.cell): one for one in figures_of(rows)}
    yield from _prefill(figures, rows)
    yield from _decode(figures, rows)
    yield from _deep(figures, rows)
    yield from _quantized_cache(figures)
    for batch in (8, 16):
        yield _against(figures, (LARGE, INT4, "16", f"decode x{batch} at 128"), "llama.cpp", 2.0)
    for how in ("warm", "cold"):
        yield _against(figures, (LARGE, INT4, "16", f"{how} file to first token, 1/s"), "llama.cpp", 1.0)
    yield _memory(rows)


def _prefill(figures: Mapping[Key, Figure], rows: Sequence[Row]) -> Iterator[Bar]:
    for shape in (LARGE, MIDDLE, SMALL):
        key = (shape, INT4, "16", "prefill 512")
        yield _against(figures, key, "llama.cpp", 2.0)
        yield _against(figures, key, "best", 1.5)
    ceilings = ceilings_of(rows, LARGE, INT4)
    kernel, most = ceilings.get("kernel_macs_per_s"), ceilings.get("int8_macs_per_s")
    alone = kernel / most if kernel and most else None
    words = f"{kernel / 1e9:.0f} of {most / 1e9:.0f} G products/s" if kernel and most else ""
    yield Bar("share of the integer ceiling, matrix product alone", f"{LARGE} {INT4}", 0.75, alone, words=words,
              percent=True)  # fmt: skip
    yield _share(figures, (LARGE, INT4, "16", "prefill 512"), 0.60, "share of the integer ceiling, end to end")
    for shape in (LARGE, MIDDLE, SMALL):
        key = (shape, INT8, "16", "prefill 512")
        yield _share(figures, key, 0.65, "share of the integer ceiling, end to end")
        yield _against(figures, key, "best", 1.2)


def _decode(figures: Mapping[Key, Figure], rows: Sequence[Row]) -> Iterator[Bar]:
    for storage in (INT4, INT8):
        key = (LARGE, storage, "16", "decode at 0")
        yield _share(figures, key, 0.90, "share of the best read bandwidth of any probe", _beside(rows, key))
        yield _against(figures, key, "best", 1.0)
        yield _equal_bytes(rows, LARGE, storage)
    for shape in (SMALL, TINY):
        for storage in (INT4, INT8):
            yield _against(figures, (shape, storage, "16", "decode at 0"), "best", 1.5)


def _deep(figures: Mapping[Key, Figure], rows: Sequence[Row]) -> Iterator[Bar]:
    """The share of what reading weights and cache allows; bars of the large model, others where they were measured."""
    for depth in (4096, 16384):
        cell = f"decode at {depth}"
        wanted = [(LARGE, INT4, kv, cell) for kv in ("16", "8")]
        wanted += [key for key in figures if key[3] == cell and key[1] in (INT4, INT8) and key not in wanted]
        for key in wanted:
            ratio = figures[key].ratio("llama.cpp") if key in figures else None
            words = ["" if ratio is None else f"{ratio:.2f} times llama.cpp", _beside(rows, key)]
            what = "share of the byte roofline, weights and cache"
            yield _share(figures, key, 0.80, what, ", ".join(filter(None, words)))


def _beside(rows: Sequence[Row], key: Key) -> str:
    """The median share of what probes read just before and after: memory may have a fast and a slow state."""
    shares = [
        rate * row["bytes_per_token"] / read
        for row in rows
        if row["record"] == "run" and row["engine"] == "ours"
        and (row["shape"], row["format"], row["kv"], row["cell"]) == key
        for rate, read in zip(row["rates"], row.get("reads", []), strict=False)
    ]  # fmt: skip
    return f"{statistics.median(shares):.0%} of the probes beside it" if shares else ""


def _quantized_cache(figures: Mapping[Key, Figure]) -> Iterator[Bar]:
    """Prefill into an int8 cache beside one into a 16-bit cache, round by round."""
    wanted = [(LARGE, INT4, "prefill 512"), (LARGE, INT4, "prefill 2048")]
    wanted += [(key[0], key[1], key[3]) for key in figures if key[2] == "8" and key[3].startswith("prefill")]
    for shape, storage, cell in dict.fromkeys(wanted):
        narrow, wide = figures.get((shape, storage, "8", cell)), figures.get((shape, storage, "16", cell))
        found = None
        if narrow and wide and "ours" in narrow.rates and "ours" in wide.rates:
            own, other = narrow.rates["ours"], wide.rates["ours"]
            both = [own[turn] / other[turn] for turn in own if turn in other]
            found = statistics.median(both) if both else None
        yield Bar("int8 cache / bf16 cache, ours", f"{shape} {storage} {cell}", 0.95, found)


def _against(figures: Mapping[Key, Figure], key: Key, peer: str, needed: float) -> Bar:
    one, what = figures.get(key), "ours / llama.cpp's best" if peer == "llama.cpp" else "ours / best of the peers"
    where = _where(key)
    if one is None or "ours" not in one.rates or not one.peers:
        return Bar(what, where, needed, None)
    name = one.best_peer if peer == "best" else peer
    found = one.ratio(name) if name else None
    if name is None or found is None:
        return Bar(what, where, needed, None)
    words = f"{one.median('ours'):.4g} against {one.median(name):.4g} {'' if '1/s' in key[3] else 'tokens/s '}({name}; "
    return Bar(what, where, needed, found, words=words + f"{_rounds(one, name)}; of {', '.join(one.peers)})")


def _rounds(one: Figure, peer: str) -> str:
    ratios = one.ratios(peer)
    return "1 round" if len(ratios) == 1 else f"{len(ratios)} rounds, {min(ratios):.2f} to {max(ratios):.2f}"


def _share(figures: Mapping[Key, Figure], key: Key, needed: float, what: str, words: str = "") -> Bar:
    one = figures.get(key)
    if one is None or "ours" not in one.rates:
        return Bar(what, _where(key), needed, None, percent=True)
    rate = f"{one.median('ours'):.4g} tokens/s"
    return Bar(what, _where(key), needed, one.share("ours"), percent=True, words=f"{rate}, {words}" if words else rate)


def _equal_bytes(rows: Sequence[Row], shape: str, storage: str) -> Bar:
    sizes = [
        row["bytes"] for row in rows if row["record"] == "files" and (row["shape"], row["format"]) == (shape, storage)
    ]
    held = sizes[-1] if sizes else {}
    what, where = "bytes of weights, apart from llama.cpp's", f"{shape} {storage}"
    if "ours" not in held or "llama.cpp" not in held:
        return Bar(what, where, BYTES_APART, None, least=False, percent=True)
    words = f"{held['ours'] / 1e6:.1f} and {held['llama.cpp'] / 1e6:.1f} MB"
    apart = abs(held["ours"] / held["llama.cpp"] - 1)
    return Bar(what, where, BYTES_APART, apart, least=False, words=words, percent=True)


def _memory(rows: Sequence[Row]) -> Bar:
    """Scratch that the engine itself counts; the process beside it is Python's."""
    found = [row["scratch_bytes"] for row in rows if "scratch_bytes" in row and row["engine"] == "ours"
             and (row["shape"], row["format"], row["cell"]) == (LARGE, INT4, "prefill 512")]  # fmt: skip
    value = max(found) / 2**20 if found else None
    what = "MiB beside weights and cache, by the engine's account"
    return Bar(what, f"{LARGE} {INT4} prefill 512", MORE_MEMORY / 2**20, value, least=False)


def _where(key: Key) -> str:
    shape, storage, kv, cell = key
    return f"{shape} {storage} {cell}" + ("" if kv == "16" else f", {kv}-bit cache")


__all__ = ["Bar", "bars_of", "bars_table"]
