"""Bench results as a page: what shapes cost on a machine. It never shows a quality figure.

Shapes with random weights have a true cost and no quality; keeping them on a page of their own is what
keeps the two from being mixed.
"""

from __future__ import annotations

from trilemma.core.results import BenchReport
from trilemma.report import numbers
from trilemma.report.page import templates

COST_METRICS = (
    "weights_bytes", "engine_memory_bytes", "peak_memory_bytes", "kv_bytes_per_token", "ttft_s", "tpot_s",
    "prefill_tokens_per_s", "decode_tokens_per_s", "energy_j_per_output_token",
)  # fmt: skip


def render_cost(bench: BenchReport) -> str:
    """The cost page of a bench run; quality figures in the trials are left out."""
    shown = [m for m in COST_METRICS if any(m in row.trial.measurements for row in bench.rows)]
    here = bench.environment
    facts = [
        ("Processor", here.cpu), ("Cores, threads used", f"{here.cores}, {here.threads or here.cores}"),
        ("Instruction set", here.isa or "not stated"), ("Memory", numbers.format_quantity(here.memory_bytes, "bytes")),
        ("System", here.system), ("Python", here.python),
        ("Packages", ", ".join(f"{name} {version}" for name, version in here.packages.items())),
    ]  # fmt: skip
    context = {"bench": bench, "columns": shown, "facts": facts}
    return templates().get_template("cost.html.j2").render(context)
