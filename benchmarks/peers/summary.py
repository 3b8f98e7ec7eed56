"""From raw runs, one JSON line each, to medians, ranges, ratios and shares of the ceilings: table and plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peers.ways import words_of
from trilemma.report.dot_chart import Dot, dot_chart
from trilemma.report.scale import Axis

Row = dict[str, Any]
FAR = 256_000_000  # bytes that no cache of the machine holds
_PRODUCTS = {"bf16": "bf16_macs_per_s", "f16": "f32_macs_per_s", "f32": "f32_macs_per_s"}  # others: int8


@dataclass(frozen=True)
class Figure:
    """One cell of one model in one format: what each engine reached, one rate a round, tokens a second."""

    shape: str
    format: str
    kv: str
    cell: str
    rates: dict[str, dict[int, float]]  # engine -> round -> median of the round's repeats
    ways: dict[str, str]
    least_s_per_token: float | None  # what the nearer ceiling allows

    def median(self, engine: str) -> float:
        return statistics.median(self.rates[engine].values())

    def ratios(self, peer: str) -> list[float]:
        """Ours over the peer's, round by round."""
        own, other = self.rates.get("ours", {}), self.rates[peer]
        return [own[turn] / other[turn] for turn in own if turn in other]

    def ratio(self, peer: str) -> float | None:
        """The median of the paired ratios; None where no round has both."""
        found = self.ratios(peer) if peer in self.rates else []
        return statistics.median(found) if found else None

    @property
    def peers(self) -> list[str]:
        return [engine for engine in self.rates if engine != "ours"]

    @property
    def best_peer(self) -> str | None:
        return max(self.peers, key=self.median, default=None)

    def share(self, engine: str) -> float | None:
        return None if self.least_s_per_token is None else self.least_s_per_token * self.median(engine)


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    """Runs grouped by cell, in the order of their first appearance; ceilings are the best of all rounds."""
    runs = [row for row in rows if row["record"] == "run"]
    keys = list(dict.fromkeys((row["shape"], row["format"], row["kv"], row["cell"]) for row in runs))
    found = []
    for key in keys:
        own = [row for row in runs if (row["shape"], row["format"], row["kv"], row["cell"]) == key]
        rates: dict[str, dict[int, float]] = {}
        for row in own:
            rates.setdefault(row["engine"], {})[row["round"]] = statistics.median(row["rates"])
        ways = {row["engine"]: words_of(row["way"]) for row in own}  # of the last round
        found.append(Figure(*key, rates, ways, _least_s(own[0], rows)))
    return found


def ceilings_of(rows: Sequence[Row], shape: str, storage: str, size: float | None = None) -> dict[str, float]:
    """The best that any probe reached: products in any round of any model; reading over as many bytes or more.

    What is read from a larger area is at least as far away, so its rate is possible here too. Beyond `FAR` bytes no
    cache helps, and all areas count as alike. The rate of our kernel is that of the model's own format.

    Args:
        size: bytes of a step; by default those of the weights alone.
    """
    probes = [row for row in rows if row["record"] == "ceilings"]
    own = [row for row in probes if (row["shape"], row["format"]) == (shape, storage)]
    if not own:
        return {}
    sizes = [row.get("bytes", 0) for row in own]
    least = min(0.9 * (min(sizes) if size is None else size), FAR, max(sizes))
    found = {}
    for name in (name for name in own[0] if name.endswith("_per_s")):
        usable = own if name.startswith("kernel") else probes
        if name == "read_bytes_per_s":
            usable = [row for row in probes if row.get("bytes", 0) >= least]
        found[name] = max(row[name] for row in usable if name in row)
    return found


def _least_s(run: Row, rows: Sequence[Row]) -> float | None:
    """Seconds a token that reading and multiplying need at the ceilings, whichever is more."""
    found = ceilings_of(rows, run["shape"], run["format"], run.get("step_bytes"))
    macs = found.get(_PRODUCTS.get(run["format"], "int8_macs_per_s"))
    if not macs or "bytes_per_token" not in run:
        return None
    return max(run["bytes_per_token"] / found["read_bytes_per_s"], run["macs_per_token"] / macs)


def table(figures: Sequence[Figure], engines: Sequence[str]) -> str:
    """Rates with their range and share of the ceiling, and our ratio to every peer and to the best one."""
    peers = [engine for engine in engines if engine != "ours"]
    heads = ["model", "format", "KV bits", "what", *engines, *(f"ours / {peer}" for peer in peers), "ours / best peer"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in figures:
        cells = [one.shape, one.format, one.kv, one.cell, *(_rate(one, engine) for engine in engines)]
        cells += [_ratio(one, peer) for peer in peers]
        best = one.best_peer
        cells.append(f"{_ratio(one, best)} {best}" if best else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate(one: Figure, engine: str) -> str:
    if engine not in one.rates:
        return "-"
    values, share = list(one.rates[engine].values()), one.share(engine)
    spread = f" ({min(values):.4g}..{max(values):.4g})" if len(values) > 1 else ""
    return f"{one.median(engine):.4g}{spread}" + ("" if share is None else f", {share:.0%}")


def _ratio(one: Figure, peer: str) -> str:
    if peer not in one.rates or not one.ratios(peer):
        return "-"
    found = one.ratios(peer)
    spread = f" ({min(found):.2f}..{max(found):.2f})" if len(found) > 1 else ""
    return f"{statistics.median(found):.2f}{spread}"


def plot(figures: Sequence[Figure], engines: Sequence[str], title: str) -> str | None:
    """Shares of the nearer ceiling as dots, an SVG document; None where no ceiling is known."""
    shown = [one for one in figures if one.least_s_per_token is not None]
    if not shown:
        return None
    several = len({one.format for one in shown}) > 1
    groups = [f"{one.format} {one.cell}" if several else one.cell for one in shown]
    dots: Callable[[str], list[Dot]] = lambda engine: [_dot(one, engine) for one in shown]  # noqa: E731
    notes = ("Share of what memory or the processor's own instructions allow, whichever is nearer. Median of rounds;",
             "lines from the lowest round to the highest. Numbers are tokens a second.")  # fmt: skip
    rows = [(engine, dots(engine)) for engine in engines if any(engine in one.rates for one in shown)]
    return dot_chart(groups, rows, Axis("share of the ceiling", "ratio", start=0.0), title=title, notes=notes)


def _dot(one: Figure, engine: str) -> Dot:
    least, share = one.least_s_per_token, one.share(engine) if engine in one.rates else None
    if share is None or least is None:
        return Dot(None, words="not measured")
    values = [least * rate for rate in one.rates[engine].values()]
    return Dot(share, (min(values), max(values)), f"{one.median(engine):.4g}")


__all__ = ["FAR", "Figure", "ceilings_of", "figures_of", "plot", "table"]
