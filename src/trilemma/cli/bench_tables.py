"""Bench results as Markdown, CSV or JSON lines: plain rows, or the rows of a sweep."""

from __future__ import annotations

import csv
import io

from trilemma.cli.console import show
from trilemma.core.measurement import Measurement
from trilemma.core.quantity import format_quantity
from trilemma.core.results import BenchReport, BenchRow
from trilemma.report.sweep_charts import place_of, sweep_of

METRICS = (
    "weights_bytes", "engine_memory_bytes", "ttft_s", "tpot_s", "prefill_tokens_per_s", "decode_tokens_per_s",
)  # fmt: skip
BATCH_METRICS = ("throughput_tokens_per_s", "itl_s", "ttft_s", "engine_memory_bytes")
COLUMNS = (
    "model", "form", "parameters", "random_weights", "metric", "value", "unit", "low", "high", "noisy",
    "context", "batch", "kv_cache", "runtime", "threads", "prompt_tokens", "output_tokens", "set_aside_share", "share",
    "reason",
)  # fmt: skip


def markdown(report: BenchReport) -> str:
    """A table for people, with the machine and the notes under it."""
    sweep = sweep_of(report.rows[0]) if report.rows else ""
    lines = {"kv": _kv_table, "batch": _batch_table}.get(sweep, _plain_table)(report)
    here = report.environment
    threads = ", ".join(str(count) for count in dict.fromkeys(_threads(report)) or [here.threads])
    lines += ["", f"{here.cpu}, {here.isa}, threads: {threads}; 95% intervals; ! marks a noisy run."]
    lines += _noise(report)
    if any(row.random_weights for row in report.rows):
        lines.append("* random weights: cost only, nothing is said about quality.")
    missing = [(row, found) for row in report.rows for found in row.trial.measurements.values() if found.reason]
    lines += [
        f"{row.trial.name}: {'' if found.metric == 'tpot_s' else found.metric + ': '}{found.reason}"
        for row, found in missing
    ]
    lines += report.notes
    return "\n".join(lines) + "\n"


def csv_text(report: BenchReport) -> str:
    """One line a model, form and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in report.rows:
        about = [row.model, row.trial.name, row.parameters, row.random_weights]
        place = place_of(row)
        where = [
            place.get(key, "")
            for key in ("context", "batch", "kv_cache", "runtime", "threads", "prompt_tokens", "output_tokens")
        ]
        for name, found in row.trial.measurements.items():
            value = "" if found.value is None else found.value
            edges = found.interval or ("", "")
            stated = found.conditions
            shares = [stated.get("set_aside_share", ""), stated.get("roofline_share", stated.get("compute_share", ""))]
            writer.writerow([*about, name, value, found.unit, *edges, found.noisy, *where, *shares, found.reason or ""])
    return out.getvalue()


def json_lines(report: BenchReport) -> str:
    """One row a line."""
    return "".join(row.model_dump_json() + "\n" for row in report.rows)


def _plain_table(report: BenchReport) -> list[str]:
    metrics = METRICS + tuple(
        metric for metric in ("peak_memory_bytes",) if any(metric in row.trial.measurements for row in report.rows)
    )
    rows = [
        [_name(row), row.trial.name, *(_short(row, metric) for metric in metrics),
         _share(row, "prefill_tokens_per_s", "compute_share"), _share(row, "decode_tokens_per_s", "roofline_share")]
        for row in report.rows
    ]  # fmt: skip
    return _table(["model", "form", *metrics, "prefill of arithmetic", "decode of bandwidth"], 2, rows)


def _kv_table(report: BenchReport) -> list[str]:
    prefills = any("ttft_s" in row.trial.measurements for row in report.rows)
    rows = []
    for row in report.rows:
        place = place_of(row)
        policy = "none (recompute)" if place["kv_cache"] == "none" else str(place["kv_cache"])
        memory = [format_quantity(float(place[part]), "bytes") for part in ("kv_bytes", "scratch_bytes")]
        time = row.trial.measurements["tpot_s"]
        shown = "skipped" if time.value is None else show(time)
        total = show(row.trial.measurements["engine_memory_bytes"])
        first = [_short(row, "ttft_s")] * prefills
        rows.append([_name(row), str(place["form"]), policy, f"{place['context']:,}", shown, *first, *memory, total])
    return _table(
        ["model", "form", "KV cache", "positions", "time per token", *["prefill up to it"] * prefills, "KV", "scratch",
         "engine memory"], 3, rows,
    )  # fmt: skip


def _batch_table(report: BenchReport) -> list[str]:
    rows = [
        [_name(row), str(place_of(row)["form"]), str(place_of(row)["batch"]),
         *(_short(row, metric) for metric in BATCH_METRICS), _bound(row)]
        for row in report.rows
    ]  # fmt: skip
    return _table(["model", "form", "sequences", *BATCH_METRICS, "step of its ceiling"], 2, rows)


def _table(headers: list[str], texts: int, rows: list[list[str]]) -> list[str]:
    """Markdown lines; the first `texts` columns are words, the others numbers."""
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * texts + "---:|" * (len(headers) - texts)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _short(row: BenchRow, metric: str) -> str:
    return show(row.trial.measurements.get(metric)).replace(" tokens/s", "")


def _name(row: BenchRow) -> str:
    return f"{row.model} ({row.parameters / 1e6:.1f}M{', *' if row.random_weights else ''})"


def _share(row: BenchRow, metric: str, condition: str) -> str:
    measured = row.trial.measurements.get(metric)
    share = None if measured is None else measured.conditions.get(condition)
    return f"{share:.0%}" if isinstance(share, float) else "—"


def _bound(row: BenchRow) -> str:
    """'43% of memory'."""
    share = _share(row, "itl_s", "roofline_share")
    bound = row.trial.measurements["itl_s"].conditions.get("bound_by")
    return f"{share} of {bound}" if bound else share


def _above(found: Measurement) -> bool:
    return any(float(found.conditions.get(key, 0.0)) > 1 for key in ("compute_share", "roofline_share"))


def _threads(report: BenchReport) -> list[int]:
    found = (place_of(row).get("threads") for row in report.rows)
    return [int(count) for count in found if count is not None]


def _noise(report: BenchReport) -> list[str]:
    """What was set aside, and why runs are noisy, once each."""
    found = [one for row in report.rows for one in row.trial.measurements.values()]
    shares = [float(one.conditions.get("set_aside_share", 0.0)) for one in found]
    lines = []
    if any(_above(one) for one in found):
        lines.append("A share above 100%: its ceiling was probed while something else used the machine.")
    if max(shares, default=0.0) > 0:
        lines.append(
            f"Up to {max(shares):.0%} of the rounds were set aside, slower than the run's quiet level by more than 5%; "
            "figures are of the others."
        )
    reasons = dict.fromkeys(one.method.partition("; noisy: ")[2] for one in found if one.noisy)
    return lines + [f"! {reason}." for reason in reasons if reason]
