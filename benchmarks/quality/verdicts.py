"""Which of ours stands against which of theirs, and what the paired interval says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trilemma.measure.stats import Interval, ratio_interval

Row = Mapping[str, Any]
PAIRS = {"W8A8-g32": ("Q8_0", 1.1)}  # a scheme of ours -> what it stands for, and the bar


@dataclass(frozen=True)
class Bout:
    """Ours against theirs at one bar; `ours` is None where nothing of ours fits the bytes."""

    what: str
    model: str
    theirs: Row
    ours: Row | None
    bar: float

    @property
    def ratio(self) -> Interval | None:
        """Mean KL of ours over theirs, paired by window."""
        return None if self.ours is None else ratio_interval(self.ours["windows"], self.theirs["windows"], scale="log")

    @property
    def verdict(self) -> str:
        """PASS: the ratio is within the bar and its interval below 1 (within the bar, where that allows more).

        NONE: nothing of ours that was measured fits."""
        if (ratio := self.ratio) is None:
            return "NONE"
        if ratio.value > self.bar:
            return "FAIL"
        return "PASS" if ratio.high is not None and ratio.high <= max(1.0, self.bar) else "INCONCLUSIVE"

    def line(self, speeds: Mapping[tuple[str, str, str], Row] | None = None) -> str:
        """A row of the table; speeds: (model, ours, theirs) -> rates of rounds."""
        ratio, ours = self.ratio, self.ours or {}
        low, high = (ratio.ci95 if ratio else None) or (float("nan"), float("nan"))
        found = f"{ratio.value:.3f} ({low:.3f} to {high:.3f})" if ratio else ""
        kl = f"{ours['kl']:.3e}" if ours else ""
        size = f"{ours['bytes'] / 1e6:.3f}" if ours else ""
        speed = (speeds or {}).get((self.model, str(ours.get("name")), str(self.theirs["name"])))
        pace = f"{max(speed['ours']) / max(speed['theirs']):.2f}" if speed else ""
        return (f"| {self.what} | {self.model} | {self.theirs['name']} | {self.theirs['bytes'] / 1e6:.3f} | "
                f"{self.theirs['kl']:.3e} | {ours.get('name', 'nothing fits')} | {size} | {kl} | {found} | "
                f"{self.bar:g} | {self.verdict} | {pace} |")  # fmt: skip


HEAD = ("| what | model | theirs | MB | KL | ours | MB | KL | ratio (95%) | at most | verdict | decode |\n"
        "|---|---|---|---:|---:|---|---:|---:|---|---:|---|---:|")  # fmt: skip


def best_within(rows: Sequence[Row], size: int) -> Row | None:
    """The row of least KL on the windows that choose, among those of at most `size` bytes."""
    fitting = [row for row in rows if row["bytes"] <= size]
    return min(fitting, key=lambda row: (row["choosing_kl"], row["kl"]), default=None)


def bouts_of(rows: Sequence[Row], bars: Mapping[str, float]) -> Iterator[Bout]:
    """All that `rows` (of one yard each model) allow. `bars`: llama.cpp's type -> bar."""
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        theirs = {row["name"]: row for row in own if row["side"] == "llama.cpp"}
        ours = [row for row in own if row["side"] == "ours"]
        for name, bar in bars.items():
            if name not in theirs:
                continue
            peer = theirs[name]
            yield Bout("same bytes", model, peer, best_within(ours, peer["bytes"]), bar)
            equal = [row for row in ours if row["ends"] == peer["ends"]]
            yield Bout("same bytes, ends equal", model, peer, best_within(equal, peer["bytes"]), bar)
        for row in (row for row in own if row["side"] == "exported" and row["like"] in theirs):
            yield Bout("exported, same types, llama.cpp runs both", model, theirs[row["like"]], row, row["bar"])
        for row in ours:
            like, bar = PAIRS.get(row["name"], ("", 0.0))
            if like in theirs:
                yield Bout("scheme", model, theirs[like], row, bar)


def kv_lines(rows: Sequence[Row]) -> list[str]:
    """Mean KL of a KV cache against the bf16 one of the same engine; a bar each."""
    lines = [
        "| model | weights | KV cache | KL against bf16 KV (95%) | at most | verdict |",
        "|---|---|---|---|---:|---|",
    ]
    for row in rows:
        found = ratio_interval(row["windows"], [1.0] * len(row["windows"]), scale="log")
        low, high = found.ci95 or (float("nan"), float("nan"))
        verdict = "PASS" if high <= row["bar"] else "INCONCLUSIVE" if found.value <= row["bar"] else "FAIL"
        lines.append(f"| {row['model']} | {row['name']} | {row['kv']} | {found.value:.3e} ({low:.3e} to {high:.3e}) | "
                     f"{row['bar']:g} | {verdict} |")  # fmt: skip
    return lines


__all__ = ["HEAD", "PAIRS", "Bout", "best_within", "bouts_of", "kv_lines"]
